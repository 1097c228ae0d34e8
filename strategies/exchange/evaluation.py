"""The held-out loss of every client, measured where its rows are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedllm.errors import WireError
from fedllm.messages import ClientEvaluation, ClientFailure
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from fedllm.wire import replies
from strategies.exchange.requesting import evaluate_requests
from strategies.exchange.validation import check_evaluation
from strategies.grid.transport import Reply
from strategies.session import Session


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss by client: under the shared adapter, and with its personal one on top.

    Without personal adapters `personal` is empty.
    """

    shared: Mapping[str, float]
    personal: Mapping[str, float]

    def noted_in(self, record: RoundRecord) -> RoundRecord:
        """Return a round's record with these losses."""
        return replace(record, held_out=self.shared, personal_held_out=self.personal)


def evaluate(session: Session, state: ServerState) -> HeldOut:
    """Return the held-out loss of every client that keeps held-out rows and answers with a sound number."""
    found: dict[str, ClientEvaluation] = {}
    number = sum(client.num_held_out > 0 for client in session.clients.values())
    session.watch.phase("evaluating", 0, number)
    for reply in session.transport.exchange(
        evaluate_requests(session, state),
        message_type="evaluate",
        group=str(state.round_num),
        deadline=session.config.federation.round_deadline,
    ):
        found.update(read_evaluations(session, reply))
        session.watch.phase("evaluating", len(found), number)
    # By name, so that a record does not tell who was quick.
    shared = {client: found[client].loss for client in sorted(found)}
    if session.config.personal.mode == "none":
        return HeldOut(shared, {})
    personal = {client: found[client].personal_loss for client in sorted(found)}
    return HeldOut(shared, {client: loss for client, loss in personal.items() if loss is not None})


def read_evaluations(session: Session, reply: Reply) -> dict[str, ClientEvaluation]:
    """Return the sound evaluations in a node's reply, of clients it hosts; the rest is only noticed."""
    try:
        answers = replies.read_evaluations(reply.received())
    except WireError as error:
        session.held_by_nodes.forget(reply.node_id, reply.content)  # it may have lost what it held
        session.watch.notice(f"node {reply.node_id} was not evaluated: {error}")
        return {}
    found: dict[str, ClientEvaluation] = {}
    for answer in answers:
        sound = check_evaluation(answer) if isinstance(answer, ClientEvaluation) else answer
        joined = session.clients.get(answer.client_id)
        if joined is None or joined.node_id != reply.node_id:  # nobody speaks for another node's clients
            session.watch.notice(f"node {reply.node_id} answered for a client it does not host")
        elif isinstance(sound, ClientFailure):
            session.watch.notice(f"client {answer.client_id} was not evaluated: {sound.reason}")
        else:
            found[answer.client_id] = sound
    return found
