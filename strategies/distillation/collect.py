"""Distillation as a collector: keeps a round's teachers, and ends the round with the step.

The last collector of a round, because it starts from the aggregate that the others have made.
"""

from dataclasses import dataclass, replace

from fedllm.messages import ClientUpdate
from fedllm.plan.run_plan import distillation_of
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan, RoundRecord
from strategies.distillation.gate import ask_clients
from strategies.distillation.report import describe_step
from strategies.distillation.step import distilled
from strategies.distillation.teachers import Teachers
from strategies.session import Session


@dataclass(frozen=True, eq=False)
class DistillationCollector:
    """The clients' adapters, which teach the aggregate once there is one."""

    session: Session
    teachers: Teachers

    def add(self, update: ClientUpdate) -> None:
        """Let a client teach, if it is among the heaviest."""
        self.teachers.add(update)

    def close(
        self, before: ServerState, after: ServerState, record: RoundRecord
    ) -> tuple[ServerState, RoundRecord]:
        """Distil the aggregate, which stays where the step fails or a gate refuses.

        Where the gate asked the clients, the losses they measured are the round's held-out losses.
        """
        if not record.applied or not record.accepted:
            return after, record
        session, plan = self.session, distillation_of(self.session.plan)
        teachers = self.teachers.without(record.aggregation.silenced)
        adapter, outcome = distilled(session, before, after, teachers)
        is_last = session.config.distill.when == "last"
        # A run that is resumed with more rounds goes on from the aggregate (`step.undistilled`)
        undistilled = after.adapter if is_last and outcome.kept else None
        state = replace(after, adapter=adapter, undistilled=undistilled)
        if outcome.kept and plan.asks_clients:
            asked = ask_clients(session, after, state, outcome)
            state, outcome = asked.state, asked.record
            if session.plan.is_evaluated(record.round_num):
                record = asked.held_out.noted_in(record)
        session.watch.notice(f"round {record.round_num}: {describe_step(outcome)}")
        return state, replace(record, distillation=outcome, adapter=state.adapter.digest)


def open_distillation(session: Session, state: ServerState, plan: RoundPlan) -> DistillationCollector | None:
    """Return the collector of a round that ends with a distillation step, None for the others."""
    distillation = session.plan.distillation
    if distillation is None or not distillation.is_due(plan.round_num):
        return None
    teachers = Teachers(state.adapter, plan.round_num, distillation.numbers.max_teachers)
    return DistillationCollector(session, teachers)
