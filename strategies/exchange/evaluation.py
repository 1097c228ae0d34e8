"""The held-out loss of every client, measured where its rows are."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedllm.errors import NonFiniteError, WireError
from fedllm.messages import ClientEvaluation, ClientFailure, ClientUpdate
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from fedllm.wire import replies
from strategies.divergence import check_finite
from strategies.exchange.causes import few, grouped
from strategies.exchange.requesting import evaluate_requests
from strategies.exchange.validation import UNSOUND, check_evaluation
from strategies.grid.transport import Reply
from strategies.session import Session


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss by client: under the shared adapter, and with its personal one on top.

    Without personal adapters `personal` is empty. `not_finite` names the clients that answered with no finite
    number.
    """

    shared: Mapping[str, float]
    personal: Mapping[str, float]
    not_finite: tuple[str, ...] = ()

    def noted_in(self, record: RoundRecord) -> RoundRecord:
        """Return a round's record with these losses."""
        return replace(
            record, held_out=self.shared, personal_held_out=self.personal, not_finite=self.not_finite
        )


def measured_in_training(session: Session, updates: Iterable[ClientUpdate]) -> HeldOut:
    """Return the held-out losses that came with a round's updates: of the adapter it started from."""
    found = {update.client_id: update.held_out for update in updates}
    return _held_out(
        session,
        {
            client: sound if isinstance(sound := check_evaluation(answer), ClientEvaluation) else None
            for client, answer in found.items()
            if answer is not None
        },
    )


def evaluate(session: Session, state: ServerState) -> HeldOut:
    """Return the held-out loss of every client that keeps held-out rows and answers with a sound number."""
    found: dict[str, ClientEvaluation | None] = {}
    hosted = session.by_node(session.clients)
    number = sum(client.num_held_out > 0 for client in session.clients.values())
    session.watch.phase("evaluating", 0, number)
    with few(session.watch.notice) as notice:
        for reply in session.transport.exchange(
            evaluate_requests(session, state),
            message_type="evaluate",
            group=str(state.round_num),
            deadline=session.deadline("evaluate"),
        ):
            found |= read_evaluations(session, reply, hosted.get(reply.node_id, []), notice)
            session.watch.phase("evaluating", len(found), number)
    return _held_out(session, found)


def _held_out(session: Session, found: Mapping[str, ClientEvaluation | None]) -> HeldOut:
    # By name, so that a record does not tell who was quick.
    sound = {client: answer for client, answer in sorted(found.items()) if answer is not None}
    shared = {client: answer.loss for client, answer in sound.items()}
    personal: dict[str, float] = {}
    if session.plan.personal is not None:
        losses = {client: answer.personal_loss for client, answer in sound.items()}
        personal = {client: loss for client, loss in losses.items() if loss is not None}
    return HeldOut(shared, personal, tuple(sorted(found.keys() - sound)))


def evaluate_base(session: Session, state: ServerState) -> RoundRecord:
    """Return record 0, which the last round is compared with, and show it; raises as `check_finite`.

    Where losses come with updates, those of the first round will be noted in it.
    """
    began = time.perf_counter()
    record = RoundRecord(round_num=0, adapter=state.adapter.digest)
    if not session.plan.measures_in_training:
        record = evaluate(session, state).noted_in(record)
    record = replace(record, seconds=time.perf_counter() - began)  # how long later evaluations will take
    session.watch.record(record)
    check_finite(session.config, state, record)
    return record


def read_evaluations(
    session: Session, reply: Reply, hosted: Sequence[str], notice: Callable[[str], None]
) -> dict[str, ClientEvaluation | None]:
    """Return the evaluations in a node's reply, of the clients it hosts; None where a loss is not finite.

    The rest is only noticed: one line for a reply, or for a cause.
    """
    try:
        answers = replies.read_evaluations(reply.received(), most=len(hosted))
    except WireError as error:
        session.held_by_nodes.forget(reply.node_id, reply.content)  # it may have lost what it held
        notice(f"node {reply.node_id} was not evaluated: {error}")
        return {}
    found: dict[str, ClientEvaluation | None] = {}
    lost: dict[str, str] = {}
    strangers = 0
    for answer in answers:
        sound = check_evaluation(answer) if isinstance(answer, ClientEvaluation) else answer
        if answer.client_id not in hosted:  # nobody speaks for another node's clients
            strangers += 1
        elif isinstance(sound, ClientFailure):
            lost[answer.client_id] = sound.reason
            if sound.code in (UNSOUND, NonFiniteError.code):
                found[answer.client_id] = None
        else:
            found[answer.client_id] = sound
    for clients, reason in grouped(lost):
        notice(f"client {clients} was not evaluated: {reason}")
    if strangers:
        notice(f"node {reply.node_id} answered for {strangers:,} clients it does not host")
    return found
