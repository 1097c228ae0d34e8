"""The aggregate of a round, as a collector: accepted updates become the next adapter."""

from dataclasses import dataclass, replace
from functools import partial

from fedllm.adapters.layout import initial_adapter
from fedllm.messages import ClientUpdate
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import AggregationRecord, RoundPlan, RoundRecord
from fedllm.seeds import derive_seed
from strategies.aggregation import combine
from strategies.aggregation.stock import stock_change
from strategies.collector import RoundOutcome
from strategies.session import Session


@dataclass(eq=False)
class AggregateCollector:
    """Combines updates as they come (`strategies.aggregation.combine`)."""

    mixture: combine.Mixture
    is_empty: bool = True

    def add(self, update: ClientUpdate) -> None:
        """Put one more update in the mixture."""
        self.mixture, self.is_empty = combine.add(self.mixture, update), False

    def close(self, before: ServerState, after: ServerState, record: RoundRecord) -> RoundOutcome:
        """Read the next adapter out of the mixture."""
        if not record.applied or self.is_empty:  # a Poisson draw may choose nobody
            return after, record
        found = combine.finish(self.mixture)
        after = replace(
            after,
            adapter=found.adapter,
            base_delta=found.base_delta,
            optimizer=found.optimizer,
            norms=found.norms,
        )
        measured = AggregationRecord(
            rho=found.rho,
            largest_rho=found.largest_rho,
            kept_energy=found.kept_energy,
            delta_norm=found.delta_norm,
            silenced=found.silenced,
        )
        return after, replace(record, aggregation=measured, adapter=found.adapter.digest)


def open_aggregate(session: Session, state: ServerState, plan: RoundPlan) -> AggregateCollector:
    """Return the collector of the round that follows `state`, with no update yet."""
    # A restart (read-out stack) draws a fresh A every round, from the run's seed.
    seed = derive_seed(session.config.seed, "fresh-adapter", plan.round_num)
    return AggregateCollector(
        combine.init(
            session.rule,
            state,
            trained=plan.trained,
            fresh=lambda: initial_adapter(session.layout, seed, session.plan.init_a),
            outside=partial(stock_change, session.stock, plan.round_num) if session.stock else None,
        )
    )
