"""The techniques of a run at the server, in the order in which they close a round."""

from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan
from strategies.aggregation.aggregate import open_aggregate
from strategies.collector import Collector
from strategies.control_variates import open_control_sum
from strategies.distillation.ending import open_distillation
from strategies.private_round import with_privacy
from strategies.session import Session


def open_collectors(session: Session, state: ServerState, plan: RoundPlan) -> tuple[Collector, ...]:
    """Return the empty collectors of a round; a new technique is one more line.

    The order matters: privacy is charged before anything is released, and distillation starts from the
    aggregate.
    """
    listed = (
        with_privacy(session, state, plan, open_aggregate(session, state, plan)),
        open_control_sum(session),
        open_distillation(session, state, plan),
    )
    return tuple(collector for collector in listed if collector is not None)
