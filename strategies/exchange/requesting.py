"""The messages of a round: one to every node, for all of its clients that train or measure."""

from collections.abc import Iterable

from flwr.app import RecordDict

from fedllm.messages import EvaluateRequest, TrainRequest
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan
from fedllm.wire.requests import write_evaluate_request, write_train_request
from strategies.cohort.plan_round import plan_round
from strategies.control_variates import control_of
from strategies.exchange.joining import rejoin
from strategies.grid.what_nodes_hold import part_to_send
from strategies.privacy import clip_of
from strategies.session import Session


def begin_round(
    session: Session, state: ServerState, attempt: int = 1
) -> tuple[RoundPlan, dict[int, RecordDict]]:
    """Return the plan of the next round and its message to every node; nothing is sent yet."""
    rejoin(session)  # who has appeared since the last round may be chosen
    plan = plan_round(session, state, attempt)
    return plan, train_requests(session, state, plan)


def train_requests(session: Session, state: ServerState, plan: RoundPlan) -> dict[int, RecordDict]:
    """Return one message per node, naming its clients that train in this round."""
    # Once for all nodes: it compares the frozen part bit by bit
    part = part_to_send(session.plan.aggregation, state.adapter, session.initial)
    contents = {}
    for node, clients in session.by_node(plan.asked).items():
        request = TrainRequest(
            round_num=plan.round_num,
            drawn={client: state.num_drawn.get(client, 0) for client in clients},
            ranks={client: plan.ranks[client] for client in clients},
            adapter=state.adapter,
            base_delta=state.base_delta,
            plan_digest=session.plan.digest,
            control=control_of(state) if session.config.train.control_variates else None,
            clip=clip_of(session.privacy, state),
            evaluate=session.plan.measures_in_training,
        )
        sending = session.held_by_nodes.what_to_send(node, part, state.base_delta.digest)
        contents[node] = write_train_request(request, sending)
    return contents


def evaluate_requests(session: Session, state: ServerState) -> dict[int, RecordDict]:
    """Return one message per free node, naming its clients that keep held-out rows.

    There is none where the privacy plan keeps held-out losses with the clients.
    """
    if session.privacy is not None and session.privacy.plan.metrics == "withheld":
        return {}
    holders = [client.client_id for client in session.clients.values() if client.num_held_out]
    return requests_about(session, state, holders)


def requests_about(session: Session, state: ServerState, asked: Iterable[str]) -> dict[int, RecordDict]:
    """Return one message per free node with the state's adapter, naming those of its clients it is for."""
    free = set(session.transport.node_ids())
    part = part_to_send(session.plan.aggregation, state.adapter, session.initial)
    contents = {}
    for node, clients in session.by_node(asked).items():
        if node not in free:  # still busy with a round: waiting for it would hold up the next
            continue
        request = EvaluateRequest(
            round_num=state.round_num,
            drawn={client: state.num_drawn.get(client, 0) for client in clients},
            adapter=state.adapter,
            base_delta=state.base_delta,
            plan_digest=session.plan.digest,
        )
        sending = session.held_by_nodes.what_to_send(node, part, state.base_delta.digest)
        contents[node] = write_evaluate_request(request, sending)
    return contents
