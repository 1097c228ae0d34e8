"""The secret sums of an attempt at a round, by the run's method."""

from fedllm.adapters.parts import part_size
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan
from fedllm.secure.vector import NUM_NUMBERS
from strategies.secure.asked_sums import asked_sums, parties_of
from strategies.secure.methods import METHODS
from strategies.secure.relay_round import RelayRound
from strategies.secure.secret_round import SecretRound
from strategies.session import Session


def open_secret_round(
    session: Session, state: ServerState, plan: RoundPlan
) -> SecretRound | RelayRound | None:
    """Return the secret sums of an attempt at a round, None where the run has none, or nobody is asked."""
    if session.plan.secure is None or not plan.asked:
        return None
    parties = parties_of(session, plan)
    asked_all = asked_sums(session, state, plan, parties)
    if session.plan.secure.is_blind:  # the plan asks all clients, so that there is one sum
        (asked,) = asked_all
        return RelayRound(session, plan, asked, parties)
    method = METHODS[session.plan.secure.method]
    size = part_size(session.layout, plan.returned) + NUM_NUMBERS
    sums = [
        method.new_sum(
            session, plan.attempt, asked, {name: parties[name] for name in asked.exchange.names}, size
        )
        for asked in asked_all
    ]
    return SecretRound(session, plan, method, sums)
