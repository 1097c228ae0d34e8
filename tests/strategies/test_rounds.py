"""When a round closes, is tried again or stops the run; who is asked; what time does to a reply."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from fedllm.config.run_config import RunConfig
from fedllm.errors import RunFailedError
from fedllm.messages import ClientUpdate
from fedllm.plan.run_plan import resolve
from fedllm.wire.refusals import write_error
from strategies.exchange.requesting import begin_round
from strategies.rounds import aggregate, next_round, run_round
from strategies.run import check_failure_rate

EVERYBODY = ("anna", "ben", "cleo", "dora")


def failing(nodes: Iterable[int], number: float = math.inf) -> Callable[[Message], list[Message]]:
    """Return what makes the first `number` train replies of these nodes useless."""
    left = [number]

    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id in set(nodes) and reply.metadata.message_type == "train" and left[0]:
            left[0] -= 1
            reply.content = RecordDict()
        return [reply]

    return tamper


def test_a_round_below_min_clients_fails_after_its_retries(make_config: Callable, open_run: Callable) -> None:
    config = make_config({"federation.min-clients": 3, "federation.max-retries": 2})
    run = open_run(config, tamper=failing([2, 4]))
    with pytest.raises(RunFailedError, match="round 1 failed 3 times; the adapter of round 0") as caught:
        next_round(run.session, run.state)
    assert "\n" not in str(caught.value)
    assert [(record.attempt, record.applied) for record in run.records] == [
        (1, False),
        (2, False),
        (3, False),
    ]
    assert {record.adapter for record in run.records} == {run.state.adapter.digest}
    state, record = run_round(run.session, run.state)
    assert state is run.state
    assert record.accepted == ("ben", "dora")
    assert set(record.lost) == {"anna", "cleo"}


def reporting(code: str, nodes: Iterable[int] = range(10)) -> Callable[[Message], list[Message]]:
    """Return what makes these nodes answer every train request with an error code."""

    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id in set(nodes) and reply.metadata.message_type == "train":
            reply.content = write_error(code)
        return [reply]

    return tamper


@pytest.mark.parametrize(
    ("code", "attempts"), [("bad-model", 1), ("missing-package", 1), ("internal", 2), ("checkpoint", 6)]
)
def test_a_round_that_cannot_succeed_is_not_repeated(
    code: str, attempts: int, make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config({"federation.max-retries": 5}), tamper=reporting(code))
    with pytest.raises(RunFailedError, match=code) as caught:
        next_round(run.session, run.state)
    assert len(run.records) == attempts
    assert set(run.records[0].codes.values()) == {code}
    assert "\n" not in str(caught.value)


def test_clients_that_fail_for_good_end_a_round_that_needs_them(
    make_config: Callable, open_run: Callable
) -> None:
    flat = {"federation.max-retries": 5, "federation.min-clients": 3}
    run = open_run(make_config(flat), tamper=reporting("bad-data", [2, 4]))
    with pytest.raises(RunFailedError, match=r"anna, cleo: .*bad-data"):
        next_round(run.session, run.state)
    assert len(run.records) == 1


def test_a_failed_round_ends_with_the_words_of_a_node_here(make_config: Callable, open_run: Callable) -> None:
    run, fail = open_run(make_config()), reporting("bad-model")

    def tamper(reply: Message) -> list[Message]:
        run.grid.errors[reply.metadata.src_node_id] = "cuda:3 is not on this machine"
        return fail(reply)

    run.grid.tamper = tamper
    with pytest.raises(RunFailedError, match=r"anna, ben, cleo and 1 more: cuda:3 is not on this machine$"):
        next_round(run.session, run.state)


def test_a_failed_round_is_applied_at_its_second_attempt(make_config: Callable, open_run: Callable) -> None:
    config = make_config({"federation.min-clients": 4})
    honest, flaky = open_run(config), open_run(config, tamper=failing([3], number=1))
    expected, _ = next_round(honest.session, honest.state)
    state, record = next_round(flaky.session, flaky.state)
    assert [(item.attempt, item.applied) for item in flaky.records] == [(1, False), (2, True)]
    assert state.adapter.digest == expected.adapter.digest
    assert state.num_drawn == expected.num_drawn
    assert state.records == (record,)


def test_a_run_stops_when_too_many_clients_fail_for_three_rounds(
    make_config: Callable, open_run: Callable
) -> None:
    config = make_config({"federation.max-failure-rate": 0.4, "federation.num-rounds": 9})
    run = open_run(config, tamper=failing([3, 5]))
    state = run.state
    for _ in range(3):
        check_failure_rate(state, 0.4)
        state, _ = next_round(run.session, state)
    with pytest.raises(RunFailedError, match="more than 40% of the clients failed in 3 rounds") as caught:
        check_failure_rate(state, 0.4)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_while_few_enough_clients_fail(make_config: Callable, open_run: Callable) -> None:
    config = make_config({"federation.max-failure-rate": 0.5, "federation.num-rounds": 9})
    run = open_run(config, tamper=failing([3, 5]))
    state = run.state
    for _ in range(4):
        state, record = next_round(run.session, state)
    assert state.round_num == 4
    assert set(record.lost) == {"ben", "dora"}


@pytest.mark.parametrize("in_batches", [False, True])
def test_an_over_selected_round_closes_with_its_cohort(
    in_batches: bool, make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(make_config({"federation.cohort": 2, "federation.over-selection": 2.0}))
    one_by_one = run.grid.pull_messages
    if in_batches:  # a SuperLink hands out all replies that have come

        def pull(ids: Iterable[str]) -> list[Message]:
            return [reply for message_id in list(ids) for reply in one_by_one([message_id])]

        monkeypatch.setattr(run.grid, "pull_messages", pull)
    state, record = next_round(run.session, run.state)
    assert record.asked == EVERYBODY
    assert record.accepted == EVERYBODY[:2]
    assert record.lost == {}
    transport = run.session.transport
    for _ in range(2):
        transport.node_ids()
    assert transport.node_ids() == [2, 3, 4, 5]
    assert transport.num_stale == (0 if in_batches else 2)
    state, record = next_round(run.session, state)
    assert record.asked == EVERYBODY


def test_a_straggler_is_asked_again_after_its_late_reply(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(make_config({"federation.round-deadline": 1.0}))
    absent = open_run(make_config({"federation.round-deadline": 60.0}), absent=[3])
    first_pull, hanging = run.grid.pull_messages, {3}

    def pull(ids: Iterable[str]) -> list[Message]:
        waiting = run.grid._waiting
        return first_pull([i for i in ids if i in waiting and waiting[i].metadata.dst_node_id not in hanging])

    monkeypatch.setattr(run.grid, "pull_messages", pull)
    transport = run.session.transport
    expected, _ = next_round(absent.session, absent.state)
    state, record = next_round(run.session, run.state)
    assert record.lost == {"ben": "no reply within 1 s"}
    assert state.adapter.digest == expected.adapter.digest
    assert transport.node_ids() == [2, 4, 5]
    expected, _ = next_round(absent.session, expected)
    state, record = next_round(run.session, state)
    assert record.asked == ("anna", "cleo", "dora")
    assert record.lost == {}
    hanging.clear()
    assert transport.node_ids() == [2, 3, 4, 5]
    assert transport.num_stale == 1
    assert state.adapter.digest == expected.adapter.digest
    _, record = next_round(run.session, state)
    assert record.accepted == EVERYBODY


@pytest.mark.parametrize("read_out", ["svd", "factor-mean"])
def test_a_round_does_not_depend_on_who_answers_first(
    read_out: str, make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"aggregation.read-out": read_out})
    forwards, backwards = open_run(config), open_run(config)
    pull = backwards.grid.pull_messages
    monkeypatch.setattr(backwards.grid, "pull_messages", lambda ids: pull(list(ids)[::-1]))
    expected, record = next_round(forwards.session, forwards.state)
    state, other = next_round(backwards.session, backwards.state)
    assert state.adapter.digest == expected.adapter.digest
    assert other.accepted == record.accepted
    assert other.training.loss == record.training.loss


def test_every_client_draws_on_where_it_stopped(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config(), tamper=failing([3], number=1))
    state, _ = next_round(run.session, run.state)
    assert state.num_drawn == {"anna": 4, "cleo": 4, "dora": 4}
    state, _ = next_round(run.session, state)
    assert state.num_drawn == {"anna": 8, "ben": 4, "cleo": 8, "dora": 8}
    run.grid.tamper = failing([2])
    state, _ = next_round(run.session, state)
    assert state.num_drawn == {"anna": 8, "ben": 8, "cleo": 12, "dora": 12}


def test_a_record_counts_packets_and_weights(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config({"federation.num-rounds": 1}))
    _, record = next_round(run.session, run.state)
    size = run.session.layout.size
    assert 4 * size * 8 < record.bytes_down < 4 * size * 8 + 8 * 300  # to train and to evaluate, in float32
    assert 2 * size * 4 < record.bytes_up < 2 * size * 4 + 4 * 300  # bfloat16 deltas
    assert record.weights == {"anna": 4.0, "ben": 6.0, "cleo": 8.0, "dora": 10.0}
    mean = sum(record.weights[name] * record.training.losses[name] for name in EVERYBODY) / 28
    assert record.training.loss == pytest.approx(mean)
    assert set(record.held_out) == set(EVERYBODY)


def test_a_round_frees_the_updates_it_has_added(make_config: Callable, open_run: Callable) -> None:
    """Else the memory of a round would grow with the number of its clients."""
    run = open_run(make_config({"aggregation.train": "b", "aggregation.read-out": "factor-mean"}))
    plan, _ = begin_round(run.session, run.state)
    sent: list[weakref.ref[Any]] = []
    in_memory: list[int] = []

    def update(client: str) -> ClientUpdate:
        values = np.ones(run.session.layout.size, np.float32)
        sent.append(weakref.ref(values))
        numbers = {"weight": 1.0, "num_tokens": 1, "train_loss": 1.0}
        delta = torch.from_numpy(values)
        return ClientUpdate(client_id=client, round_num=1, rank=2, delta=delta, **numbers)  # type: ignore[arg-type]

    def answers() -> Iterator[ClientUpdate]:
        for client in plan.asked:
            yield update(client)
            in_memory.append(sum(values() is not None for values in sent))

    _, record = aggregate(run.session, run.state, plan, answers())
    assert record.accepted == EVERYBODY
    assert max(in_memory) == 1


@pytest.mark.parametrize(("every", "evaluated"), [("ends", [3]), (2, [2, 3, 4, 6])])
def test_a_run_measures_its_last_round_and_every_so_many(every: int | str, evaluated: list[int]) -> None:
    plan = resolve(RunConfig.from_flat({"federation.num-rounds": 3, "evaluation.every": every}))
    assert [number for number in range(1, 7) if plan.is_evaluated(number)] == evaluated


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"federation.num-clients": 10, "federation.cohort": 0.25}, 2),
        ({"federation.num-clients": 10, "federation.cohort": 0.01}, 1),
        ({"federation.num-clients": 10, "federation.cohort": 7}, 7),
        ({"federation.num-clients": 3}, 3),
    ],
)
def test_a_cohort_is_a_fixed_size_or_a_fraction_and_at_least_one(flat: dict[str, Any], expected: int) -> None:
    assert resolve(RunConfig.from_flat(flat)).cohort.size == expected


def test_a_cosine_schedule_falls_and_a_constant_one_stays() -> None:
    flat = {"federation.num-rounds": 4, "train.learning-rate": 0.8}
    cosine = RunConfig.from_flat({**flat, "train.schedule": "cosine"})
    rates = [resolve(cosine).training(round_num).learning_rate for round_num in range(1, 5)]
    assert rates == pytest.approx([0.8, 0.4 + 0.4 * math.sqrt(0.5), 0.4, 0.4 - 0.4 * math.sqrt(0.5)])
    constant = RunConfig.from_flat(flat)
    assert {resolve(constant).training(round_num).learning_rate for round_num in range(1, 5)} == {0.8}
