"""Distillation as the last collector of a round: whatever goes wrong costs the step and never the round."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedllm.adapters.layout import AdapterState
from fedllm.errors import FedLLMError
from fedllm.messages import ClientUpdate
from fedllm.models.files import first_line
from fedllm.plan.run_plan import distillation_of
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import DistillationRecord, RoundPlan, RoundRecord
from strategies.collector import RoundOutcome
from strategies.distillation.gate import ask_clients
from strategies.distillation.report import describe_step
from strategies.distillation.step import distil_aggregate
from strategies.distillation.teachers import ClientAdapter, Teachers
from strategies.session import Session


@dataclass(frozen=True, eq=False)
class DistillationCollector:
    """Keeps the clients' adapters of a round, which teach the aggregate once there is one."""

    session: Session
    teachers: Teachers

    def add(self, update: ClientUpdate) -> None:
        """Let a client teach, if it is among the heaviest."""
        self.teachers.add(update)

    def close(self, before: ServerState, after: ServerState, record: RoundRecord) -> RoundOutcome:
        """Distil the aggregate, which stays where the step fails or a gate refuses.

        Losses that the gate had the clients measure are the round's, where it is to be evaluated.
        """
        if not record.applied or not record.accepted:
            return after, record
        session, plan = self.session, distillation_of(self.session.plan)
        teachers = self.teachers.without(record.aggregation.silenced)
        session.watch.phase("distilling", 0, 0)
        adapter, outcome = try_step(session, before, after, teachers)
        torch.cuda.empty_cache()  # now the clients compute, in a simulation in a process of their own
        # A run that is resumed with more rounds goes on from the aggregate, so it is kept as well.
        aggregate = after.adapter if plan.numbers.when == "last" and outcome.kept else None
        state = replace(after, adapter=adapter, undistilled=aggregate)
        if outcome.kept and plan.asks_clients:
            state, outcome, held_out = ask_clients(session, after, state, outcome)
            if session.plan.is_evaluated(record.round_num):
                record = held_out.noted_in(record)
        session.watch.notice(f"round {record.round_num}: {describe_step(outcome)}")
        return state, replace(record, distillation=outcome, adapter=state.adapter.digest)


def open_distillation(session: Session, state: ServerState, plan: RoundPlan) -> DistillationCollector | None:
    """Return the collector of a round that ends with a distillation step, None for the others."""
    step = session.plan.distillation
    if step is None or not step.is_due(plan.round_num):
        return None
    return DistillationCollector(session, Teachers(state.adapter, plan.round_num, step.numbers.max_teachers))


def try_step(
    session: Session, before: ServerState, after: ServerState, adapters: Sequence[ClientAdapter]
) -> tuple[AdapterState, DistillationRecord]:
    """Return the adapter that a round ends with and what the step did; a failure leaves the aggregate."""
    began = time.perf_counter()
    try:
        if adapters:
            adapter, record = distil_aggregate(session, before, after, adapters)
            return adapter, replace(record, seconds=time.perf_counter() - began)
        reason = "no client of the round is left to teach"
    except FedLLMError as error:
        reason = str(error)
    except (MemoryError, torch.OutOfMemoryError):
        reason = "out of memory; lower distill.max-tokens or distill.batch-size"
    except (RuntimeError, OSError) as error:  # what torch and the disk raise
        reason = f"it failed: {first_line(error)}"
    return after.adapter, DistillationRecord(kept=False, reason=reason, seconds=time.perf_counter() - began)


def undo_distillation(state: ServerState) -> ServerState:
    """Return the state as it was before the distillation after what is no longer the last round.

    So a run that goes on with more rounds has the bits of one that was planned with them.
    """
    if state.undistilled is None:
        return state
    *earlier, last = state.records
    # What was said of the distilled adapter does not hold for the aggregate.
    last = replace(
        last,
        distillation=None,
        adapter=state.undistilled.digest,
        held_out={},
        personal_held_out={},
        at_home=None,
    )
    return replace(state, adapter=state.undistilled, undistilled=None, records=(*earlier, last))
