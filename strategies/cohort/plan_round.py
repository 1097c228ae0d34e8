"""What the next round will do: which clients are asked, and the numbers that follow from the run's plan."""

from dataclasses import replace

from fedllm.errors import WithdrawnError
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan
from strategies.cohort.selection import choose_clients
from strategies.cohort.voices import OVER_MEDIAN, OVER_MEDIAN_ROBUST, shared_out, voice_of, weight_limits
from strategies.privacy import clients_that_can_afford, cohort_seed
from strategies.session import Session


def plan_round(session: Session, state: ServerState, attempt: int) -> RoundPlan:
    """Choose the clients of the next round and its numbers.

    Clients of busy nodes are not asked, nor those whose late reply this round will take: one update a round.
    A client whose site has withdrawn is not asked again.
    """
    config, round_num = session.config, state.round_num + 1
    free = set(session.transport.node_ids()) - {reply.node_id for reply in session.transport.overdue}
    able = clients_that_can_afford(session.privacy, state, session.clients, attempt)
    able -= {client for client, barred in session.barred.items() if barred == round_num}
    codes = [answer for record in state.records for answer in record.codes.items()]
    able -= {client for client, code in codes if code == WithdrawnError.code}
    available = [c for c in session.clients.values() if c.node_id in free and c.client_id in able]
    voices, rows, most_weights = _shares(session)
    if voices:  # a site draws no more attention than it has a say
        available = [replace(c, num_train=max(1, int(rows[c.client_id]))) for c in available]
    cohort, seed = session.plan.cohort, cohort_seed(session.privacy, config.seed)
    asked = choose_clients(
        available, state.records, cohort=cohort, seed=seed, round_num=round_num, attempt=attempt
    )
    cohort_size = cohort.size
    if cohort.rule == "poisson" and available:  # with nobody free there was nothing to draw from
        asked = asked if len(asked) >= config.federation.min_clients else ()
        cohort_size = len(asked)
    return RoundPlan(
        round_num=round_num,
        attempt=attempt,
        asked=asked,
        cohort_size=cohort_size,
        # Dealt over all clients and then chosen from: a client's rank must not depend on who else is asked.
        ranks={client: rank for client, rank in session.ranks().items() if client in asked},
        training=session.plan.training(round_num),
        trained=session.plan.aggregation.trained_in(round_num),
        returned=session.plan.aggregation.returned_in(round_num),
        # AdamW's weight decay moves a value in proportion to its size (`largest_move`).
        largest_start=float(state.adapter.vector.abs().max()),
        deadline=session.deadline("train"),
        voices=voices,
        most_weights=most_weights,
    )


def _shares(session: Session) -> tuple[dict[str, str], dict[str, float], dict[str, float]]:
    """Return every client's site, the rows it is drawn by, and the most it weighs.

    All are empty in a simulation: there a node is a worker of one machine, and no site.
    """
    if session.transport.is_simulation():
        return {}, {}, {}
    clients, plan = session.clients.values(), session.plan
    voices = {client.client_id: voice_of(client) for client in clients}
    declared = {client.client_id: float(client.num_train) for client in clients}
    over = OVER_MEDIAN if plan.aggregation.robust == "none" else OVER_MEDIAN_ROBUST
    return voices, shared_out(declared, voices, {}, over), weight_limits(clients, plan, session.sites)
