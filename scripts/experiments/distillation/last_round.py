"""A federation's last round, with its clients' adapters at hand."""

from dataclasses import dataclass, replace

from fedllm.adapters.layout import AdapterState
from fedllm.config.run_config import RunConfig
from fedllm.distillation.teacher import Teacher
from fedllm.engine.engine import Engine
from fedllm.messages import ClientUpdate
from scripts.runtimes.local import init, step
from strategies.cohort.plan_round import plan_round
from strategies.distillation.step import open_engine
from strategies.distillation.teachers import ClientAdapter, Teachers, priors_of
from strategies.exchange.receiving import receive, sort_answers
from strategies.exchange.requesting import train_requests
from strategies.rounds import aggregate
from strategies.session import Session


@dataclass(frozen=True, eq=False)
class Round:
    """A federation's last round: the aggregate and the adapters it was made of."""

    session: Session
    engine: Engine
    aggregate: AdapterState
    clients: tuple[ClientAdapter, ...]

    def teacher(self, kind: str) -> Teacher:
        """Return the ensemble of the round's clients."""
        vectors = tuple(client.vector for client in self.clients)
        return Teacher(vectors, self.engine.layout, priors_of(self.clients), kind)


def last_round(config: RunConfig) -> Round:
    """Return a federation's last round, with the adapters of its clients."""
    state = init(config)
    for _ in range(config.federation.num_rounds - 1):
        state, _ = step(state)
    session, before = state.session, state.server
    plan = plan_round(session, before, 1)
    arriving = receive(session, plan, train_requests(session, before, plan))
    answers = list(sort_answers(arriving, plan.asked, session.room))
    teachers = Teachers(before.adapter, plan.round_num, config.distill.max_teachers)
    for answer in answers:
        if isinstance(answer, ClientUpdate):
            teachers.add(answer)
    # The run's own step would put a student in the aggregate's place, and use up the query of the round.
    plain = replace(session, plan=replace(session.plan, distillation=None))
    after, record = aggregate(plain, before, plan, answers)
    clients = teachers.without(record.aggregation.silenced)
    return Round(session, open_engine(session), after.adapter, clients)
