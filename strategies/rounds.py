"""The round loop. `run_round` is one round in eight steps, three of them at the clients."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan, RoundRecord, TrainingRecord
from strategies.cohort.late_updates import discounted
from strategies.collector import RoundOutcome
from strategies.collectors import open_collectors
from strategies.divergence import check_finite
from strategies.exchange.causes import failure_of, stays
from strategies.exchange.evaluation import evaluate, measured_in_training
from strategies.exchange.joining import wait_for_nodes
from strategies.exchange.receiving import Answer, sort_answers
from strategies.exchange.requesting import begin_round
from strategies.privacy import check_budget
from strategies.secure.open_round import open_updates
from strategies.session import Session


def next_round(session: Session, state: ServerState) -> RoundOutcome:
    """Return the state after one more round, trying again where too few clients answered.

    Raises:
        RunFailedError: the round failed more often than `federation.max-retries` allows, or no attempt can
            succeed any more.
        DivergedError: what it gave is no finite numbers.
        BudgetSpentError: another attempt would exceed the privacy budget.
    """
    federation = session.config.federation
    stuck: dict[str, str] = {}  # client -> the code it would report again, whichever cohort is drawn
    before: Mapping[str, str] = {}
    for attempt in range(1, federation.max_retries + 2):
        check_budget(session.privacy, state, session.clients, attempt, least=federation.min_clients)
        if attempt > 1:
            wait_for_nodes(session)
        state, record = run_round(session, state, attempt)
        session.watch.record(record)
        if record.applied:
            check_finite(session.config, state, record)
            return state, record
        session.watch.notice(
            f"round {record.round_num}: {len(record.accepted)} updates accepted, {federation.min_clients}"
            " are needed; the adapter is unchanged"
        )
        stuck |= {client: code for client, code in record.codes.items() if stays(code, before.get(client))}
        if len(session.clients.keys() - stuck) < federation.min_clients:
            break
        before = record.codes
    raise failure_of(session, state, record, attempt)


def run_round(session: Session, state: ServerState, attempt: int = 1) -> RoundOutcome:
    """Do one attempt at the next round; a round with too few accepted updates changes nothing but the ledger.

    Raises:
        BudgetSpentError, CheckpointError: a release would exceed the privacy budget, or cannot be recorded.
    """
    began, transport = time.perf_counter(), session.transport
    # 1 Plan: choose the cohort and what it trains.
    plan, requests = begin_round(session, state, attempt)
    down, up = transport.bytes_down, transport.bytes_up  # requests to join belong to no round
    # 2 Send and 3 receive: answers are checked as they arrive; a bad one is dropped and named.
    session.watch.phase("training", 0, len(plan.asked))
    updates = open_updates(session, state, plan)  # one by one, or as a sum alone
    updates.add_to(requests)
    answers = updates.answers(requests)
    # 4 Prepare the data, 5 train, 6 protect: all three next to the data (`clients/train.py`).
    # 7 Aggregate: the updates in the order of the plan, into the next state; distillation is the last part.
    after, record = aggregate(session, state, plan, answers)
    record = updates.noted_in(record)
    # 8 Finish: evaluate, unless the distillation step already did, and record. `strategies.run` saves.
    if record.applied and session.plan.is_evaluated(plan.round_num) and not record.held_out:
        record = evaluate(session, after).noted_in(record)
    record = replace(
        record,
        bytes_down=transport.bytes_down - down,
        bytes_up=transport.bytes_up - up,
        seconds=time.perf_counter() - began,
    )
    return (replace(after, records=(*after.records, record)) if record.applied else after), record


def aggregate(
    session: Session, state: ServerState, plan: RoundPlan, answers: Iterable[Answer]
) -> RoundOutcome:
    """Return the state and the record that a round's answers lead to.

    Answers are used up as they arrive, so that at most one update is in memory next to the collectors' own.
    """
    collectors = open_collectors(session, state, plan)
    accepted: dict[str, ClientUpdate] = {}
    lost: dict[str, ClientFailure] = {}
    for answer in sort_answers(answers, plan.asked, session.room):
        if isinstance(answer, ClientFailure):
            lost[answer.client_id] = answer
            continue
        update = discounted(answer, plan.round_num)
        for collector in collectors:
            collector.add(update)
        for member in update.members or (update,):
            # Numbers only: even a slice of the delta would keep it in memory.
            accepted[member.client_id] = replace(member, delta=member.delta.new_empty(0), control_delta=None)
    # A Poisson draw may choose nobody: then the round is empty and has not failed.
    is_applied = len(accepted) >= session.config.federation.min_clients or plan.cohort_size == 0
    record = _record(state, plan, accepted, lost, is_applied=is_applied)
    after = _next_state(state, plan, accepted) if is_applied else state
    for collector in collectors:
        after, record = collector.close(state, after, record)
    if is_applied:
        after = _with_measured(session, after, plan, accepted.values())
    return after, record


def _with_measured(
    session: Session, state: ServerState, plan: RoundPlan, updates: Iterable[ClientUpdate]
) -> ServerState:
    """Return the state with the held-out losses that came with updates, in the record of the round before.

    They are of the adapter that the round started from; late updates started from another.

    Raises:
        DivergedError: most of them are not finite.
    """
    held_out = measured_in_training(session, (one for one in updates if one.round_num == plan.round_num))
    if not (held_out.shared or held_out.not_finite) or not state.records or state.records[-1].held_out:
        return state
    *earlier, last = state.records
    last = held_out.noted_in(last)
    check_finite(session.config, state, last, is_saved=last.round_num > 0)
    session.watch.notice(f"round {last.round_num}: held-out {last.mean_held_out:.4f}")
    return replace(state, records=(*earlier, last))


def _next_state(state: ServerState, plan: RoundPlan, accepted: Iterable[str]) -> ServerState:
    """Return the state one round on, its adapter not yet changed.

    Only accepted clients count as having drawn rows: one whose update was lost trains on the same rows again.
    """
    drawn = plan.training.steps * plan.training.batch_size
    counts = {client: state.num_drawn.get(client, 0) + drawn for client in accepted}
    num_drawn = {**state.num_drawn, **counts}
    return replace(state, round_num=plan.round_num, num_drawn=num_drawn, undistilled=None)


def _record(
    state: ServerState,
    plan: RoundPlan,
    accepted: Mapping[str, ClientUpdate],
    lost: Mapping[str, ClientFailure],
    *,
    is_applied: bool,
) -> RoundRecord:
    """Return the record of a round before its collectors are closed."""
    # In the order of the plan again: the members of a node's sum came all at once.
    late = sorted(accepted.keys() - set(plan.asked))
    updates = {client: accepted[client] for client in (*plan.asked, *late) if client in accepted}
    told = [update for update in updates.values() if update.num_tokens]  # a site may withhold its numbers
    total = sum(update.weight for update in told)
    rounds_late = {client: plan.round_num - update.round_num for client, update in updates.items()}
    training = TrainingRecord(
        loss=sum(u.weight * u.train_loss for u in told) / total if total else None,
        losses={client: update.train_loss for client, update in updates.items()},
        seconds={client: update.seconds for client, update in updates.items()},
        num_tokens=sum(update.num_tokens for update in updates.values()),
        learning_rate=plan.training.learning_rate,
        trained=plan.trained,
    )
    return RoundRecord(
        round_num=plan.round_num,
        attempt=plan.attempt,
        asked=plan.asked,
        accepted=tuple(updates),
        lost={client: failure.reason or failure.code for client, failure in lost.items()},
        codes={client: failure.code for client, failure in lost.items()},
        unsent=tuple(client for client, failure in lost.items() if failure.sent_nothing),
        weights={client: update.weight for client, update in updates.items()},
        staleness={client: rounds for client, rounds in rounds_late.items() if rounds},
        applied=is_applied,
        deadline=plan.deadline,
        adapter=state.adapter.digest,
        training=training,
    )
