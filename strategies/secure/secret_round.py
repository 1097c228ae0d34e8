"""A round whose updates the server sees as one sum: who is in it, its two exchanges, and what came out.

    1 add_to     every train request names the parties of its clients' sum, under a label that is never used
                 again: fresh random bits are in it, so an attempt, or a restart, has another
    2 answers    masked answers are summed as they come; then a second exchange brings the shares that open
                 the sums. What comes out is an update like that of a node that sums its clients
    3 noted_in   the record says who was in the sums and who broke the protocol, and no number of one client

Who broke it is not asked again in this round. A forged vector bends the sum and cannot be told from an honest
one, as far as no value of the mean is beyond what honest clients reach.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import RecordDict

from fedllm.adapters.parts import whole_of
from fedllm.errors import SecureError, WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.runs.records import RoundPlan, RoundRecord, SecureRecord
from fedllm.secure.vector import SecretSum
from fedllm.wire.masks import UNMASK, add_sums, read_openings
from strategies.exchange.causes import few
from strategies.exchange.receiving import Answer, receive
from strategies.grid.transport import Reply
from strategies.secure.answers import in_sum, not_opened
from strategies.secure.methods import Method, PartySum
from strategies.session import Session


@dataclass(eq=False)
class SecretRound:
    """The secret sums of one attempt at a round, one for each group of parties."""

    session: Session
    plan: RoundPlan
    method: Method
    groups: Sequence[PartySum]
    seconds: float = 0.0  # of the second exchange

    def add_to(self, requests: Mapping[int, RecordDict]) -> None:
        """Name in the request to each node the parties of the sums that its clients are in."""
        hosted = self.session.by_node(self.plan.asked)
        for node, content in requests.items():
            clients = set(hosted[node])
            sums = [
                replace(group.asked, clients=tuple(one for one in group.asked.clients if one in clients))
                for group in self.groups
            ]
            add_sums(content, [asked for asked in sums if asked.clients])
            named = [group for group, asked in zip(self.groups, sums, strict=True) if asked.clients]
            self.method.name_parties(content, named)

    def answers(self, requests: Mapping[int, RecordDict]) -> Iterator[Answer]:
        """Send the requests and yield the update of each group, and why the other clients have none."""
        for answer in receive(self.session, self.plan, requests, self._taken):
            if isinstance(answer, ClientFailure):
                yield answer
        self._open()
        for group in self.groups:
            yield from self._answers_of(group)
        for group in self.groups:
            for party in group.faults:  # a node that sums its clients would go by the name of the next
                self.session.barred.update(dict.fromkeys(group.clients[party], self.plan.round_num))

    def noted_in(self, record: RoundRecord) -> RoundRecord:
        """Return the record with what became of the sums, and without numbers of single clients."""
        noted = SecureRecord(
            method=self.session.config.secure.method,
            parties=sum(len(group.clients) for group in self.groups),
            threshold=sum(group.exchange.threshold for group in self.groups),
            answered=sum(len(group.answered) for group in self.groups),
            opened=sum(len(group.openings) for group in self.groups),
            seconds=self.seconds,
            faults=self._faults(),
        )
        training = replace(record.training, losses={}, seconds={})
        return replace(record, secure=noted, training=training)

    def _faults(self) -> dict[str, str]:
        return {party: why for group in self.groups for party, why in group.faults.items()}

    def _taken(self, content: RecordDict, asked: Sequence[str]) -> list[Answer]:
        """Return which of a node's clients have trained, their vectors being summed, and which have not.

        Raises:
            WireError: the reply is malformed.
        """
        placed = {
            party: group
            for group in self.groups
            for party, clients in group.clients.items()
            if clients[0] in asked
        }
        exchanges = {party: group.exchange for party, group in placed.items()}
        found = self.method.read(content, exchanges, most=len(asked))
        answers: list[Answer] = [*found.failed]
        in_vector = found.members({party: group.clients[party] for party, group in placed.items()})
        for party, members in in_vector.items():
            group = placed[party]
            try:
                group.add(party, found.hidden[party], members)
                answers += [in_sum(client, self.plan) for client in members]
            except SecureError as error:
                group.faults[party] = str(error)
                answers += [not_opened(client, error) for client in members]
        return answers

    def _open(self) -> None:
        """Ask the parties that answered for the shares that open their sums."""
        began, session = time.perf_counter(), self.session
        ready = [group for group in self.groups if group.is_enough]
        contents = {}
        for node, clients in session.by_node(self.plan.asked).items():
            questions = [group.question(clients) for group in ready]
            if own := [question for question in questions if question is not None]:
                contents[node] = self.method.write_question(
                    own, round_num=self.plan.round_num, plan_digest=session.plan.digest
                )
        session.watch.phase("opening the sum", 0, len(contents))
        replies = session.transport.exchange(
            contents,
            message_type=UNMASK,
            group=str(self.plan.round_num),
            deadline=session.deadline(UNMASK),
            is_enough=lambda: all(group.is_open for group in ready),
        )
        with few(session.watch.notice) as notice:
            for done, reply in enumerate(replies, start=1):
                for line in self._take_openings(reply, ready):
                    notice(line)
                session.watch.phase("opening the sum", done, len(contents))
        self.seconds = time.perf_counter() - began

    def _take_openings(self, reply: Reply, ready: Sequence[PartySum]) -> Iterator[str]:
        """Take the shares in a reply; yield what is wrong with it, in a line each."""
        hosted = self.session.by_node(self.plan.asked).get(reply.node_id, [])
        try:
            openings, failed = read_openings(reply.received(), most=len(hosted))
        except WireError as error:
            yield f"node {reply.node_id} opened no shares of the secret sum: {error}"
            return
        for client, failure in failed.items():
            if client in hosted:
                yield f"client {client} opened no shares of the secret sum: {failure.reason}"
        for group in ready:
            for client in [client for client in hosted if client in openings and client in group.answered]:
                group.take_opening(client, openings[client])
                if client in group.faults:
                    yield group.faults[client]

    def _answers_of(self, group: PartySum) -> Iterator[Answer]:
        """Yield the update of a group, or that its clients have none."""
        try:
            found = group.opened(self.session.plan.most_tokens(self.plan.round_num))
        except SecureError as error:
            yield from (not_opened(client, error) for client in group.members)
        else:
            yield self._update(group, found)

    def _update(self, group: PartySum, found: SecretSum) -> ClientUpdate:
        """Return the update of all clients of a group: of each it says what their mean says."""
        number, layout = len(group.members), self.session.layout
        shared = in_sum(group.members[0], self.plan)
        members = tuple(
            replace(
                shared,
                client_id=client,
                weight=found.weight / number,
                num_tokens=found.num_tokens // number,
                train_loss=found.loss,
            )
            for client in group.members
        )
        return replace(
            shared,
            delta=whole_of(layout, torch.from_numpy(found.mean).float(), self.plan.returned),
            weight=found.weight,
            num_tokens=found.num_tokens,
            members=members,
        )
