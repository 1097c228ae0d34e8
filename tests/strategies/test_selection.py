"""Who is asked: laws of the five rules, and that a run asks the same clients however it is run."""

import hmac
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedllm.config.run_config import KEYS
from fedllm.messages import JoinedClient
from fedllm.plan.cohort import CohortPlan
from fedllm.runs.records import RoundRecord, TrainingRecord
from strategies.cohort.selection import RULES, choose_clients
from strategies.rounds import next_round

NUM_DRAWS = 4000


def clients(rows: dict[str, int] | Iterable[str]) -> list[JoinedClient]:
    sizes = rows if isinstance(rows, dict) else dict.fromkeys(rows, 5)
    return [
        JoinedClient(client_id=name, node_id=0, num_train=size, num_held_out=0, fingerprint="f" * 64)
        for name, size in sizes.items()
    ]


def choose(
    available: Sequence[JoinedClient],
    rule: str,
    cohort_size: int = 2,
    past: Sequence[RoundRecord] = (),
    **changes: Any,
) -> tuple[str, ...]:
    draw = {"seed": 7, "round_num": 1, "attempt": 1}
    draw.update({key: changes.pop(key) for key in list(changes) if key in draw})
    values = {"num_clients": max(1, len(available)), "size": cohort_size, **changes}
    return choose_clients(available, past, cohort=CohortPlan(rule=rule, **values), **draw)


def record(round_num: int, losses: dict[str, float], seconds: float | dict[str, float] = 1.0) -> RoundRecord:
    times = seconds if isinstance(seconds, dict) else dict.fromkeys(losses, seconds)
    return RoundRecord(round_num=round_num, training=TrainingRecord(losses=losses, seconds=times))


def test_every_rule_can_be_configured() -> None:
    assert set(RULES) == set(KEYS["federation.selection"].words)


@settings(deadline=None, max_examples=60)
@given(
    available=st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 1000), max_size=12),
    losses=st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 20), max_size=12),
    rule=st.sampled_from(sorted(RULES.keys() - {"poisson"})),
    cohort_size=st.integers(1, 12),
    over=st.floats(1, 3),
    round_num=st.integers(2, 5),
)
def test_a_cohort_is_a_seeded_draw_without_replacement(
    available: dict[str, int],
    losses: dict[str, float],
    rule: str,
    cohort_size: int,
    over: float,
    round_num: int,
) -> None:
    past = [record(1, losses)]
    options: dict[str, Any] = {"over_selection": over, "round_num": round_num, "past": past}
    chosen = choose(clients(available), rule, cohort_size, **options)
    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= available.keys()
    assert len(chosen) == min(len(available), math.ceil(cohort_size * over))
    backwards = dict(sorted(available.items(), reverse=True))
    assert choose(clients(backwards), rule, cohort_size, **options) == chosen


@pytest.mark.parametrize("rule", RULES)
def test_every_client_has_its_turn_and_each_attempt_draws_anew(rule: str) -> None:
    names = [f"c{number}" for number in range(6)]
    past: list[RoundRecord] = []
    draws = []
    for round_num in range(1, 25):
        for attempt in (1, 2):
            chosen = choose(clients(names), rule, 2, past, round_num=round_num, attempt=attempt)
            draws.append(chosen)
        past.append(record(round_num, {name: 1.0 + int(name[1]) for name in chosen}))
    assert set().union(*draws) == set(names)
    assert len(set(draws)) > 5


def test_the_uniform_draw_takes_the_smallest_keyed_hashes() -> None:
    names = [f"c{number}" for number in range(8)]

    def turn(name: str) -> bytes:
        message = f"str:cohort\x1fint:2\x1fint:3\x1fstr:{name}"
        return hmac.digest(b"5", message.encode(), "sha256")

    chosen = choose(clients(names), "uniform", 3, seed=5, round_num=2, attempt=3)
    assert chosen == tuple(sorted(sorted(names, key=turn)[:3]))


@pytest.mark.parametrize(("num_clients", "size"), [(6, 1), (7, 3), (20, 4), (5, 5)])
def test_without_a_client_only_the_rounds_that_asked_it_change(num_clients: int, size: int) -> None:
    names = [f"c{number}" for number in range(num_clients)]
    for round_num in range(1, 60):
        asked = choose(clients(names), "uniform", size, round_num=round_num)
        for gone in names:
            rest = [name for name in names if name != gone]
            now = choose(clients(rest), "uniform", size, round_num=round_num)
            assert set(now) >= set(asked) - {gone}
            if gone not in asked:
                assert now == asked


def test_uniform_cohorts_are_all_alike() -> None:
    pairs = list(itertools.combinations("abcde", 2))
    draws = Counter(choose(clients("abcde"), "uniform", 2, round_num=number) for number in range(NUM_DRAWS))
    expected = NUM_DRAWS / len(pairs)
    # 9 degrees of freedom; the statistic of a fixed seed, below the value that one seed in a thousand exceeds
    assert sum((draws[pair] - expected) ** 2 / expected for pair in pairs) < chi2.isf(0.001, 9)


def test_a_weighted_draw_of_one_is_proportional_to_the_rows() -> None:
    rows = {"a": 1, "b": 2, "c": 7}
    counts = Counter(choose(clients(rows), "weighted", 1, round_num=n)[0] for n in range(NUM_DRAWS))
    for name, size in rows.items():
        expected = size / 10
        deviation = math.sqrt(expected * (1 - expected) / NUM_DRAWS)
        assert abs(counts[name] / NUM_DRAWS - expected) < 4 * deviation


def test_a_weighted_draw_of_two_is_that_of_successive_draws() -> None:
    rows = {"a": 1, "b": 2, "c": 7}
    counts = Counter(choose(clients(rows), "weighted", 2, round_num=n) for n in range(NUM_DRAWS))
    for pair in (("a", "b"), ("a", "c"), ("b", "c")):
        first, second = (rows[name] / 10 for name in pair)
        expected = first * second / (1 - first) + second * first / (1 - second)
        deviation = math.sqrt(expected * (1 - expected) / NUM_DRAWS)
        assert abs(counts[pair] / NUM_DRAWS - expected) < 4 * deviation


def test_poisson_coins_are_independent_and_of_the_same_rate() -> None:
    names = "abcd"
    draws = [choose(clients(names), "poisson", 2, round_num=n, num_clients=8) for n in range(NUM_DRAWS)]
    rate = 2 / 8
    for name in names:
        share = sum(name in draw for draw in draws) / NUM_DRAWS
        assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / NUM_DRAWS)
    together = sum("a" in draw and "b" in draw for draw in draws) / NUM_DRAWS
    assert abs(together - rate**2) < 4 * math.sqrt(rate**2 * (1 - rate**2) / NUM_DRAWS)
    empty = sum(not draw for draw in draws) / NUM_DRAWS
    assert abs(empty - (1 - rate) ** 4) < 4 * math.sqrt(0.32 * 0.68 / NUM_DRAWS)


def test_uniform_and_poisson_look_at_neither_rows_nor_losses() -> None:
    few, many = clients({"a": 1, "b": 1}), clients({"a": 1, "b": 10**6})
    for round_num in range(1, 20):
        for rule in ("uniform", "poisson"):
            past = [record(1, {"a": 9.0})]
            known = choose(many, rule, 1, past, round_num=round_num)
            assert choose(few, rule, 1, round_num=round_num) == known


def test_power_of_choice_takes_unknown_clients_then_high_losses() -> None:
    past = [record(1, {"a": 1.0, "b": 9.0, "c": 2.0}), record(2, {"b": 0.5, "d": 3.0})]
    everybody = clients("abcd")
    assert choose(everybody, "power-of-choice", 2, past, candidates=4) == ("c", "d")  # b's newest is 0.5
    assert choose(clients("abcde"), "power-of-choice", 2, past, candidates=5) == ("d", "e")
    assert choose(everybody, "power-of-choice", 1, past, candidates=4, over_selection=3.0) == ("a", "c", "d")


def test_power_of_choice_without_spare_candidates_is_weighted() -> None:
    rows = {"a": 1, "b": 2, "c": 7, "d": 4}
    past = [record(1, {"a": 1.0, "b": 9.0})]
    for number in range(1, 30):
        options = {"round_num": number, "candidates": 2}
        by_choice = choose(clients(rows), "power-of-choice", 2, past, **options)
        assert by_choice == choose(clients(rows), "weighted", 2, round_num=number)


def test_power_of_choice_draws_twice_the_cohort_by_default() -> None:
    names = [f"c{number}" for number in range(8)]
    past = [record(1, {name: float(name[1]) for name in names})]
    for number in range(1, 30):
        options = {"round_num": number, "candidates": 4}
        chosen = choose(clients(names), "power-of-choice", 2, past, **options)
        assert choose(clients(names), "power-of-choice", 2, past, round_num=number) == chosen


def test_oort_explores_much_at_first_and_a_fifth_in_the_end() -> None:
    known = {f"k{number}": 1.0 for number in range(20)}
    names = [*known, *(f"u{number}" for number in range(20))]

    def num_unknown(round_num: int) -> int:
        chosen = choose(clients(names), "oort", 10, [record(1, known)], round_num=round_num)
        return sum(name.startswith("u") for name in chosen)

    assert num_unknown(2) == 9
    assert num_unknown(20) == 6
    assert num_unknown(1000) == 2


def test_oort_prefers_utility_and_counts_slow_clients_less() -> None:
    losses = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 0.1}
    quick, slow = dict.fromkeys(losses, 1.0), {"a": 1.0, "b": 1.0, "c": 20.0, "d": 1.0}
    assert choose(clients(losses), "oort", 1, [record(1, losses, quick)], round_num=2) == ("c",)
    options: dict[str, Any] = {"round_num": 2, "preferred_seconds": 2.0}
    assert choose(clients(losses), "oort", 1, [record(1, losses, quick)], **options) == ("c",)
    assert choose(clients(losses), "oort", 1, [record(1, losses, slow)], **options) == ("b",)
    assert choose(clients(losses), "oort", 1, [record(1, losses, slow)], round_num=2) == ("c",)
    rows = {"a": 5, "b": 5, "c": 5, "d": 1000}  # utility grows with the rows
    assert choose(clients(rows), "oort", 1, [record(1, losses, quick)], round_num=2) == ("d",)


def test_oort_comes_back_to_a_client_it_has_not_asked_for_long() -> None:
    past = [record(1, {"a": 1.0}), *(record(number, {"b": 1.1}) for number in range(2, 200))]
    assert choose(clients("ab"), "oort", 1, past, round_num=200) == ("a",)


def chosen_in(run: Any, num_rounds: int) -> list[tuple[str, ...]]:
    state = run.state
    for _ in range(num_rounds):
        state, _ = next_round(run.session, state)
    return [item.asked for item in state.records]


@pytest.mark.parametrize("rule", RULES)
def test_the_same_clients_are_asked_whoever_answers_first(
    rule: str, make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"federation.selection": rule, "federation.cohort": 2})
    forwards, backwards = open_run(config), open_run(config)
    pull = backwards.grid.pull_messages
    monkeypatch.setattr(backwards.grid, "pull_messages", lambda ids: pull(list(ids)[::-1]))
    asked = chosen_in(forwards, 4)
    assert asked == chosen_in(backwards, 4)
    assert len(set(asked)) > 1


def test_an_empty_poisson_round_is_recorded_and_no_failure(make_config: Callable, open_run: Callable) -> None:
    flat = {"federation.selection": "poisson", "federation.cohort": 1, "federation.num-clients": 4}
    run = open_run(make_config({**flat, "federation.max-retries": 0, "federation.num-rounds": 30}))
    state, num_empty = run.state, 0
    for number in range(1, 13):
        after, item = next_round(run.session, state)
        assert after.round_num == number
        assert item.applied
        assert after.records[-1] == item
        if not item.asked:
            num_empty += 1
            assert after.adapter.digest == state.adapter.digest == item.adapter
            assert after.num_drawn == state.num_drawn
            assert (item.lost, item.bytes_down, item.bytes_up) == ({}, 0, 0)
        else:
            assert item.accepted == item.asked
            assert after.adapter.digest != state.adapter.digest
        state = after
    assert 0 < num_empty < 12


@pytest.mark.parametrize(
    "rule",
    [
        {"aggregation.preset": "flora"},
        {"aggregation.preset": "fedex"},
        {"aggregation.preset": "fedit", "aggregation.optimizer": "fedavgm"},
        {"aggregation.robust": "norm-clip"},
    ],
)
def test_an_empty_poisson_round_moves_no_part_of_the_state(
    rule: dict[str, Any], make_config: Callable, open_run: Callable
) -> None:
    flat = {"federation.selection": "poisson", "federation.cohort": 1, "federation.num-rounds": 30}
    run = open_run(make_config({**flat, **rule}))
    state, item = next_round(run.session, run.state)
    while item.asked or state.adapter.digest == run.state.adapter.digest:
        before, (state, item) = state, next_round(run.session, state)
    assert state.round_num == before.round_num + 1
    assert (state.adapter, state.base_delta, state.norms) == (before.adapter, before.base_delta, before.norms)
    assert state.optimizer is before.optimizer


def test_a_poisson_draw_below_min_clients_asks_nobody(make_config: Callable, open_run: Callable) -> None:
    flat = {"federation.selection": "poisson", "federation.cohort": 2, "federation.min-clients": 2}
    asked = chosen_in(open_run(make_config(flat)), 10)
    assert {len(names) for names in asked} >= {0, 2}
    assert 1 not in {len(names) for names in asked}


def test_a_poisson_round_waits_for_more_clients_than_expected(
    make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config({"federation.selection": "poisson", "federation.cohort": 2}))
    state = run.state
    for _ in range(12):
        state, item = next_round(run.session, state)
        assert item.accepted == item.asked
    assert max(len(item.asked) for item in state.records) > 2
