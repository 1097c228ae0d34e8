"""The held-out loss of every client, measured where its rows are."""

from flwr.app import RecordDict

from fedllm.errors import WireError
from fedllm.runs.checkpoint import ServerState
from fedllm.types import ClientEvaluation, ClientFailure, EvaluateRequest
from fedllm.wire import replies, requests
from strategies.delivered import travelling_part
from strategies.session import Session
from strategies.transport import Reply
from strategies.validation import check_evaluation


def evaluate(session: Session, state: ServerState) -> dict[str, float]:
    """Return the held-out loss of every client that keeps held-out rows and answers with a sound number."""
    losses: dict[str, float] = {}
    for reply in session.transport.exchange(
        evaluate_requests(session, state),
        message_type="evaluate",
        group=str(state.round_num),
        deadline=session.config.federation.round_deadline,
    ):
        losses.update(read_losses(session, reply))
    return dict(sorted(losses.items()))


def evaluate_requests(session: Session, state: ServerState) -> dict[int, RecordDict]:
    """Return one message per free node, naming its clients that keep held-out rows."""
    holders = [client.client_id for client in session.clients.values() if client.num_held_out]
    free = set(session.transport.node_ids())
    part = travelling_part(session.rule, state.adapter, session.initial)
    return {
        node: requests.write_evaluate_request(
            EvaluateRequest(
                round_num=state.round_num,
                client_ids=tuple(clients),
                adapter=state.adapter,
                drift=state.drift,
                local_b=session.rule.local_b,
            ),
            session.delivered.sending(node, part, state.drift.digest),
        )
        for node, clients in session.by_node(holders).items()
        if node in free
    }


def read_losses(session: Session, reply: Reply) -> dict[str, float]:
    """Return the sound held-out losses in a node's reply, of clients it hosts; the rest is only noticed."""
    if reply.content is None:
        session.delivered.failed(reply.node_id, None)
        session.watch.notice(f"node {reply.node_id} was not evaluated: {reply.reason}")
        return {}
    try:
        answers = replies.read_evaluations(reply.content)
    except WireError as error:
        session.delivered.failed(reply.node_id, reply.content)
        session.watch.notice(f"node {reply.node_id} was not evaluated: {error}")
        return {}
    losses: dict[str, float] = {}
    for answer in answers:
        sound = check_evaluation(answer) if isinstance(answer, ClientEvaluation) else answer
        joined = session.clients.get(answer.client_id)
        if joined is None or joined.node_id != reply.node_id:
            session.watch.notice(f"node {reply.node_id} answered for a client it does not host")
        elif isinstance(sound, ClientFailure):
            session.watch.notice(f"client {answer.client_id} was not evaluated: {sound.reason}")
        else:
            losses[answer.client_id] = sound.loss
    return losses
