"""The round loop: plan, send, receive, aggregate, finish. One function per step, one screen for all."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import RecordDict

from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.errors import RunFailedError
from fedllm.messages import ClientFailure, ClientUpdate, TrainRequest
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan, RoundRecord, TrainingRecord
from fedllm.seeds import derive_seed
from fedllm.wire import requests
from strategies.aggregation import combine
from strategies.aggregation.stock import stock_change
from strategies.cohort.late_updates import discounted
from strategies.cohort.selection import choose_clients
from strategies.control_variates import ControlSum, control_of, empty_sum, num_in_mean
from strategies.distillation.ending import end_with_distillation
from strategies.distillation.teachers import Teachers, open_teachers
from strategies.exchange.evaluation import evaluate
from strategies.exchange.joining import rejoin
from strategies.exchange.receiving import Answer, first_updates, in_order, receive
from strategies.grid.what_nodes_hold import travelling_part
from strategies.privacy import (
    NoisedSum,
    charged,
    check_budget,
    clip_of,
    cohort_seed,
    described,
    empty_noised,
    release_of,
    request_name,
    who_can_afford,
)
from strategies.session import Session

FAILING_ROUNDS = 3  # rounds in a row above federation.max-failure-rate before the run stops


def next_round(session: Session, state: ServerState) -> tuple[ServerState, RoundRecord]:
    """Return the state after one more round, trying again where too few clients answered.

    Raises:
        RunFailedError: the round failed more often than `federation.max-retries` allows.
        BudgetSpentError: another attempt would exceed the privacy budget.
    """
    federation = session.config.federation
    for attempt in range(1, federation.max_retries + 2):
        check_budget(session.privacy, state, session.clients, attempt=attempt, least=federation.min_clients)
        if attempt > 1:
            wait_for_nodes(session)
        state, record = run_round(session, state, attempt)
        session.watch.record(record)
        if record.applied:
            break
        session.watch.notice(
            f"round {record.round_num}: {len(record.accepted)} updates accepted, {federation.min_clients}"
            " are needed; the adapter is unchanged"
        )
    else:
        raise RunFailedError(
            f"round {record.round_num} failed {attempt} times; the adapter of round {state.round_num} is kept"
        )
    return state, record


def wait_for_nodes(session: Session) -> None:
    """Wait until as many clients as a round needs are on free nodes, for the join deadline at most.

    Clients that join meanwhile count.
    """
    federation = session.config.federation
    ends = time.monotonic() + federation.join_deadline
    while time.monotonic() < ends:
        rejoin(session)
        free = set(session.transport.node_ids())
        if sum(client.node_id in free for client in session.clients.values()) >= federation.min_clients:
            return
        time.sleep(session.transport.poll_seconds)


def run_round(session: Session, state: ServerState, attempt: int = 1) -> tuple[ServerState, RoundRecord]:
    """Do one attempt at the next round; the state comes back unchanged where too few updates are accepted."""
    began, transport = time.perf_counter(), session.transport
    rejoin(session)
    down, up = transport.bytes_down, transport.bytes_up
    plan = plan_round(session, state, attempt)  # 1 plan
    contents = train_requests(session, state, plan)  # 2 send, 3 receive; 4-6 happen beside the data
    answers = receive(session, plan, contents)
    if len(plan.asked) > plan.cohort_size or transport.keeps_late:
        answers = first_updates(answers, plan.cohort_size)
    sums = open_sums(session, state, plan)
    record, mixture = fold(session, state, plan, answers, sums)  # 7 validate and combine
    after, record = finish(session, state, plan, record, mixture, sums)  # 8 finish
    held_out = None
    if sums.teachers is not None and record.accepted and record.applied:
        after, record, held_out = end_with_distillation(session, state, after, record, sums.teachers)
    if record.applied and session.plan.is_evaluated(plan.round_num):
        held_out = held_out or evaluate(session, after)
        record = replace(record, held_out=held_out.shared, personal_held_out=held_out.personal)
    record = replace(
        record,
        bytes_down=transport.bytes_down - down,
        bytes_up=transport.bytes_up - up,
        seconds=time.perf_counter() - began,
    )
    return (replace(after, records=(*state.records, record)) if record.applied else after), record


def plan_round(session: Session, state: ServerState, attempt: int) -> RoundPlan:
    """Choose the clients of the next round and its numbers.

    Clients of busy nodes are not asked, nor those whose late reply this round will take: one update a round.
    """
    config, round_num = session.config, state.round_num + 1
    free = set(session.transport.node_ids()) - {reply.node_id for reply in session.transport.overdue}
    able = who_can_afford(
        session.privacy, state.ledger, session.clients, round_num=round_num, attempt=attempt
    )
    available = [c for c in session.clients.values() if c.node_id in free and c.client_id in able]
    cohort = session.plan.cohort
    asked = choose_clients(
        available,
        state.records,
        cohort=cohort,
        seed=cohort_seed(session.privacy, config.seed),
        round_num=round_num,
        attempt=attempt,
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
        ranks={client: rank for client, rank in session.ranks().items() if client in asked},
        training=session.plan.training(round_num),
        trained=session.rule.trained_in(round_num),
        returned=session.rule.returned_in(round_num),
        largest_start=float(state.adapter.vector.abs().max()),
    )


def train_requests(session: Session, state: ServerState, plan: RoundPlan) -> dict[int, RecordDict]:
    """Return one message per node, naming all of its clients that take part."""
    config = session.config
    part = travelling_part(session.rule, state.adapter, session.initial)
    contents = {}
    for node, clients in session.by_node(plan.asked).items():
        request = TrainRequest(
            round_num=plan.round_num,
            client_ids=tuple(clients),
            num_drawn=tuple(state.num_drawn.get(client, 0) for client in clients),
            ranks=tuple(plan.ranks[client] for client in clients),
            adapter=state.adapter,
            base_delta=state.base_delta,
            plan_digest=session.plan.digest,
            control=control_of(state) if config.train.control_variates else None,
            clip=clip_of(session.privacy, state),
        )
        sending = session.delivered.sending(node, part, state.base_delta.digest)
        contents[node] = requests.write_train_request(request, sending)
    return contents


@dataclass(frozen=True, eq=False)
class RoundSums:
    """What a round keeps besides its mixture: changes of control variates, updates under central noise, and
    the adapters a distillation step learns from.
    """

    controls: ControlSum | None = None
    noised: NoisedSum | None = None
    teachers: Teachers | None = None


def open_sums(session: Session, state: ServerState, plan: RoundPlan) -> RoundSums:
    """Return the empty sums of a round."""
    controls = empty_sum(session.layout) if session.config.train.control_variates else None
    noised = empty_noised(session.privacy, state, session.layout, plan.returned)
    teachers = open_teachers(session.plan.distillation, state.adapter, plan.round_num)
    return RoundSums(controls, noised, teachers)


NO_SUMS = RoundSums()


def open_mixture(session: Session, state: ServerState, plan: RoundPlan) -> combine.RoundUpdates:
    """Return the empty mixture of a round."""
    seed = derive_seed(session.config.seed, "fresh-adapter", plan.round_num)
    return combine.init(
        session.rule,
        state,
        trained=plan.trained,
        fresh=lambda: initial_adapter(session.layout, seed, session.plan.init_a),
        stock_rule=partial(stock_change, session.stock, plan.round_num) if session.stock else None,
    )


def fold(
    session: Session,
    state: ServerState,
    plan: RoundPlan,
    answers: Iterable[Answer],
    sums: RoundSums = NO_SUMS,
) -> tuple[RoundRecord, combine.RoundUpdates]:
    """Combine the answers on arrival; return what happened and the mixture of the accepted updates.

    Changes of control variates are added to `sums`, and so are updates whom a distillation step learns from,
    and those that are to be noised as a sum: these are in no mixture.
    """
    config, mixture = session.config, open_mixture(session, state, plan)
    accepted: dict[str, ClientUpdate] = {}
    lost: dict[str, str] = {}
    for answer in in_order(answers, plan.asked):
        if isinstance(answer, ClientFailure):
            lost[answer.client_id] = answer.reason or answer.code
        else:
            update = discounted(answer, plan.round_num, config.aggregation.staleness_exponent)
            if sums.noised is not None:
                sums.noised.add(update)
            else:
                mixture = combine.add(mixture, update)
            if sums.controls is not None:
                sums.controls.add(update)
            if sums.teachers is not None:
                sums.teachers.add(update)
            for member in update.members or (update,):  # numbers only
                accepted[member.client_id] = replace(member, delta=member.delta[:0], control_delta=None)
    late = sorted(accepted.keys() - set(plan.asked))
    accepted = {client: accepted[client] for client in (*plan.asked, *late) if client in accepted}
    total = sum(update.weight for update in accepted.values())
    record = RoundRecord(
        round_num=plan.round_num,
        attempt=plan.attempt,
        asked=plan.asked,
        accepted=tuple(accepted),
        lost=lost,
        weights={client: update.weight for client, update in accepted.items()},
        staleness={
            client: plan.round_num - update.round_num
            for client, update in accepted.items()
            if update.round_num < plan.round_num
        },
        training=TrainingRecord(
            loss=sum(u.weight * u.train_loss for u in accepted.values()) / total if total else None,
            losses={client: update.train_loss for client, update in accepted.items()},
            seconds={client: update.seconds for client, update in accepted.items()},
            num_tokens=sum(update.num_tokens for update in accepted.values()),
            learning_rate=plan.training.learning_rate,
            trained=plan.trained,
        ),
        applied=len(accepted) >= config.federation.min_clients or plan.cohort_size == 0,
        adapter=state.adapter.digest,
    )
    return record, mixture


def finish(
    session: Session,
    state: ServerState,
    plan: RoundPlan,
    record: RoundRecord,
    mixture: combine.RoundUpdates,
    sums: RoundSums = NO_SUMS,
) -> tuple[ServerState, RoundRecord]:
    """Read the mixture out into the next state; a round that is not applied changes nothing but the ledger.

    Raises:
        BudgetSpentError, CheckpointError: a release would exceed the privacy budget, or cannot be recorded.
    """
    state, record, mixture = _released(session, state, plan, record, mixture, sums.noised)
    if not record.applied:
        return state, record
    if not record.accepted and sums.noised is None:  # coins that chose nobody
        return replace(state, round_num=plan.round_num), record
    aggregate = combine.finish(mixture)
    drawn = plan.training.steps * plan.training.batch_size
    counts = {client: state.num_drawn.get(client, 0) + drawn for client in record.accepted}
    num_drawn = {**state.num_drawn, **counts}
    after = replace(
        state,
        round_num=plan.round_num,
        adapter=aggregate.adapter,
        undistilled=None,
        num_drawn=num_drawn,
        base_delta=aggregate.base_delta,
        optimizer=aggregate.optimizer,
        norms=aggregate.norms,
        control=_control_after(session, state, sums.controls, num_drawn),
    )
    measured = aggregate.measured
    if sums.noised is not None:  # of one noised sum nobody can tell what its clients disagreed on
        measured = replace(measured, rho=None, largest_rho=None, kept_energy=None)
    return after, replace(record, aggregation=measured, adapter=aggregate.adapter.digest)


def _control_after(
    session: Session, state: ServerState, controls: ControlSum | None, num_drawn: Mapping[str, int]
) -> AdapterState | None:
    if controls is None:
        return None
    num_clients = session.config.federation.num_clients
    before, after = num_in_mean(num_clients, state.num_drawn), num_in_mean(num_clients, num_drawn)
    return controls.added_to(control_of(state), before=before, after=after)


def _released(
    session: Session,
    state: ServerState,
    plan: RoundPlan,
    record: RoundRecord,
    mixture: combine.RoundUpdates,
    noised: NoisedSum | None,
) -> tuple[ServerState, RoundRecord, combine.RoundUpdates]:
    """Charge the round under its privacy plan, and put the noised sum, if there is one, in the mixture."""
    privacy = session.privacy
    if privacy is None:
        return state, record, mixture
    release = release_of(privacy, plan, noised) if noised is not None and record.applied else None
    name = release.name if release else request_name(plan, state.adapter, session.config.seed)
    state = charged(privacy, state, plan, session.clients, name)
    clients = [session.clients[client] for client in plan.asked]
    record = described(privacy, state, record, clients, noised)
    if release is None:
        return state, record, mixture
    return replace(state, clip=release.clip), record, combine.add(mixture, release.update)


def check_failure_rate(state: ServerState, limit: float) -> None:
    """Stop a run whose clients keep failing; called once its last round is saved.

    Raises:
        RunFailedError: more than `limit` of the clients failed in each of the last three rounds.
    """
    recent = [r for r in state.records if r.round_num > 0][-FAILING_ROUNDS:]
    rates = [len(record.lost) / len(record.asked) for record in recent if record.asked]
    if len(rates) == FAILING_ROUNDS and min(rates) > limit:
        reasons = sorted(set(recent[-1].lost.values()))
        raise RunFailedError(
            f"more than {limit:.0%} of the clients failed in {FAILING_ROUNDS} rounds in a row"
            f" (last: {reasons[0]}); the adapter of round {state.round_num} is kept"
        )
