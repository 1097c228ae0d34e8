"""A round that the server only passes on: sealed shares to their holders, and opened sums to all parties.

Of what it carries it reads nothing: no update, no sum and no adapter, which the parties have for themselves.
It knows who took part and, by its digest, whether all parties have the same adapter.

    1 add_to     every train request names the parties and the three that hold shares, at different nodes
    2 answers    a box of each party for each holder; then each holder is asked for the sum of its shares, and
                 all parties are given the three sums. What comes out is an update that changes nothing here
    3 noted_in   the record has the digest of the parties' adapter, and no number of any client
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from flwr.app import RecordDict

from fedllm.errors import RunFailedError, SecureError, WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.runs.records import RoundPlan, RoundRecord, SecureRecord
from fedllm.secure.additive import NUM_HOLDERS, apart
from fedllm.wire.masks import UNMASK, AskedSum, add_sums, read_openings
from fedllm.wire.shared import (
    HOLD,
    TOTAL,
    RelayQuestion,
    add_holders,
    read_shared,
    write_relay_question,
)
from strategies.exchange.causes import few
from strategies.exchange.receiving import Answer, receive
from strategies.secure.answers import in_sum, not_opened
from strategies.session import Session


@dataclass(eq=False)
class RelayRound:
    """One attempt at a round of a blind relay; `clients` has those that each party speaks for."""

    session: Session
    plan: RoundPlan
    asked: AskedSum
    clients: Mapping[str, tuple[str, ...]]
    boxes: dict[str, tuple[bytes, ...]] = field(default_factory=dict)  # party -> one for each holder
    members: list[str] = field(default_factory=list)
    sums: dict[str, bytes] = field(default_factory=dict)  # holder -> what it has opened
    digest: str = ""  # of the parties' adapter after the round
    seconds: float = 0.0  # of the exchanges after training

    @property
    def holders(self) -> tuple[str, ...]:
        """The parties that hold shares, in turn from attempt to attempt, since a lost one costs it."""
        names = self.asked.exchange.names
        turned = [names[(self.plan.attempt - 1 + place) % len(names)] for place in range(len(names))]
        first = {self.session.clients[name].node_id: name for name in reversed(turned)}
        return tuple(name for name in turned if name in first.values())[:NUM_HOLDERS]

    @property
    def answered(self) -> tuple[str, ...]:
        """The parties that have sealed their shares, in their order."""
        return tuple(name for name in self.asked.exchange.names if name in self.boxes)

    def add_to(self, requests: Mapping[int, RecordDict]) -> None:
        """Name in the request to each node the parties of the sum, and who holds their shares.

        Raises:
            RunFailedError: the clients of the run are at fewer nodes than hold shares.
        """
        num_nodes = len({client.node_id for client in self.session.clients.values()})
        if num_nodes < NUM_HOLDERS:  # before anything is trained, since no attempt can do better
            raise RunFailedError(
                f"secure.method = 'shares' needs clients at {NUM_HOLDERS} different nodes, and they are at"
                f" {num_nodes}; start more nodes, or use secure.method = 'masks'"
            )
        hosted = self.session.by_node(self.plan.asked)
        for node, content in requests.items():
            add_sums(content, [replace(self.asked, clients=tuple(hosted[node]))])
            add_holders(content, self.holders)

    def answers(self, requests: Mapping[int, RecordDict]) -> Iterator[Answer]:
        """Send the requests, pass on what they bring, and yield one update of all that are in the sum.

        Raises:
            RunFailedError: parties have gone on from different adapters.
        """
        for answer in receive(self.session, self.plan, requests, self._taken):
            if isinstance(answer, ClientFailure):
                yield answer
        began = time.perf_counter()
        try:
            self._hold()
            self._deliver()
        except SecureError as error:
            yield from (not_opened(client, error) for client in self.members)
        else:
            yield self._update()
        self.seconds = time.perf_counter() - began

    def noted_in(self, record: RoundRecord) -> RoundRecord:
        """Return the record with what became of the sum, and without numbers of single clients."""
        noted = SecureRecord(
            method=self.session.config.secure.method,
            parties=len(self.clients),
            threshold=self.asked.exchange.threshold,
            answered=len(self.boxes),
            opened=len(self.sums),
            seconds=self.seconds,
            faults={},
        )
        training = replace(record.training, losses={}, seconds={})
        adapter = self.digest or record.adapter
        return replace(record, secure=noted, training=training, weights={}, adapter=adapter)

    def _taken(self, content: RecordDict, asked: Sequence[str]) -> list[Answer]:
        """Return which of a node's clients have trained, their boxes being kept, and which have not."""
        own = {party: clients for party, clients in self.clients.items() if clients[0] in asked}
        found = read_shared(content, own, most=len(asked))
        answers: list[Answer] = [*found.failed]
        for party, members in found.members(own).items():
            self.boxes[party] = found.hidden[party]
            self.members += members
            answers += [in_sum(client, self.plan) for client in members]
        return answers

    def _hold(self) -> None:
        """Ask each holder for the sum of its shares.

        Raises:
            SecureError: too few parties answered, or a holder does not open its sum.
        """
        answered, least = self.answered, self.asked.exchange.threshold
        if len(answered) < least:
            raise SecureError(f"{len(answered)} parties answered, and {least} are needed")
        questions = {}
        for place, holder in enumerate(self.holders):
            parts = {party: self.boxes[party][place] for party in answered}
            questions[self.session.clients[holder].node_id] = self._question(HOLD, [holder], parts)
        self.sums = self._exchange(questions)
        if missing := [holder for holder in self.holders if holder not in self.sums]:
            raise SecureError(f"holder {missing[0]} has not opened its sum")

    def _deliver(self) -> None:
        """Give all parties the opened sums, and compare the adapters that they have after that.

        Raises:
            SecureError: too few parties have gone on. RunFailedError: they have not all the same adapter.
        """
        sums = {holder: self.sums[holder] for holder in self.holders}
        questions = {}
        for node, clients in self.session.by_node(self.plan.asked).items():
            if own := [client for client in clients if client in self.clients]:
                questions[node] = self._question(TOTAL, own, sums)
        digests = {party: found.hex() for party, found in self._exchange(questions).items()}
        least = self.asked.exchange.threshold
        if len(digests) < least:
            raise SecureError(f"{len(digests)} parties have gone on from the sum, and {least} are needed")
        if strays := apart(digests):
            raise RunFailedError(
                f"round {self.plan.round_num}: {', '.join(strays)} went on from another adapter than most: a"
                " holder of shares opened different sums; leave out who may have, and start again"
            )
        self.digest = next(iter(digests.values()))

    def _question(self, kind: str, clients: Sequence[str], parts: Mapping[str, bytes]) -> RecordDict:
        question = RelayQuestion(
            kind=kind,
            round_num=self.plan.round_num,
            clients=tuple(clients),
            label=self.asked.exchange.label,
            answered=self.answered,
            parts=parts,
        )
        return write_relay_question(question, self.session.plan.digest)

    def _exchange(self, questions: Mapping[int, RecordDict]) -> dict[str, bytes]:
        """Return what clients answer to the question to their node; what is wrong is said in a line each."""
        found: dict[str, bytes] = {}
        hosted = self.session.by_node(self.plan.asked)
        replies = self.session.transport.exchange(
            questions,
            message_type=UNMASK,
            group=str(self.plan.round_num),
            deadline=self.session.deadline(UNMASK),
        )
        with few(self.session.watch.notice) as notice:
            for reply in replies:
                clients = hosted.get(reply.node_id, [])
                try:
                    opened, failed = read_openings(reply.received(), most=len(clients))
                except WireError as error:
                    notice(f"node {reply.node_id} opened nothing of the secret sum: {error}")
                    continue
                found |= {client: data for client, data in opened.items() if client in clients}
                for client in failed.keys() & set(clients):
                    notice(f"client {client} opened nothing of the secret sum: {failed[client].reason}")
        return found

    def _update(self) -> ClientUpdate:
        """Return an update of all that are in the sum, which leaves the server's own adapter as it is."""
        shared = in_sum(self.members[0], self.plan)
        members = tuple(replace(shared, client_id=client, weight=1.0) for client in self.members)
        delta = torch.zeros(self.session.layout.size)
        return replace(shared, delta=delta, weight=float(len(members)), members=members)
