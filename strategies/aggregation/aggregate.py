"""The aggregate of a round, as a collector: accepted updates become the next adapter."""

from dataclasses import dataclass, replace
from functools import partial

from fedllm.adapters.layout import initial_adapter
from fedllm.messages import ClientUpdate
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan, RoundRecord
from fedllm.seeds import derive_seed
from strategies.aggregation import combine
from strategies.aggregation.stock import stock_change
from strategies.collector import RoundOutcome
from strategies.session import Session


@dataclass(eq=False)
class AggregateCollector:
    """Combines updates as they come (`strategies.aggregation.combine`)."""

    updates: combine.RoundUpdates

    def add(self, update: ClientUpdate) -> None:
        """Take in one more update."""
        self.updates = combine.add(self.updates, update)

    def close(self, before: ServerState, after: ServerState, record: RoundRecord) -> RoundOutcome:
        """Read the next adapter out of the updates."""
        if not record.applied or self.updates.is_empty:  # a Poisson draw may choose nobody
            return after, record
        found = combine.finish(self.updates)
        after = replace(
            after,
            adapter=found.adapter,
            base_delta=found.base_delta,
            optimizer=found.optimizer,
            norms=found.norms,
        )
        return after, replace(record, aggregation=found.measured, adapter=found.adapter.digest)


def open_aggregate(session: Session, state: ServerState, plan: RoundPlan) -> AggregateCollector:
    """Return the collector of the round that follows `state`, with no update yet."""
    # A restart (read-out stack) draws a fresh A every round, from the run's seed.
    seed = derive_seed(session.config.seed, "fresh-adapter", plan.round_num)
    return AggregateCollector(
        combine.RoundUpdates(
            session.plan.aggregation,
            state,
            trained=plan.trained,
            keep=session.room.keep,
            voices=plan.voices,
            fresh=lambda: initial_adapter(session.layout, seed, session.plan.init_a),
            stock_rule=partial(stock_change, session.stock, plan.round_num) if session.stock else None,
        )
    )
