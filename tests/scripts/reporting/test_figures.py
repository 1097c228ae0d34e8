"""Ticks are round and reach around the values; names at the ends of lines keep apart."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.reporting.figures import Line, apart, line_chart, ticks

number = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


@given(number, number)
def test_ticks_reach_around_the_values(first: float, second: float) -> None:
    low, high = sorted((first, second))
    found = ticks(low, high)
    slack = 1e-9 * max(abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 8


def test_ticks_are_round_numbers() -> None:
    assert ticks(0.13, 0.87) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6))
def test_places_keep_their_order_and_distance(places: list[float]) -> None:
    moved = sorted(apart(places, 15, 0, 100))
    assert all(second - first >= 15 - 1e-9 for first, second in pairwise(moved))
    assert moved[0] >= -1e-9
    assert moved[-1] <= 100 + 1e-9


def test_places_that_are_apart_stay() -> None:
    assert apart([40.0, 10.0, 90.0], 15, 0, 100) == [40.0, 10.0, 90.0]


def test_a_chart_of_rounds_has_no_half_rounds() -> None:
    chart = line_chart([Line("a", [(0, 3.0), (1, 2.5), (2, 2.0)])], "loss", "round", "loss").wide
    assert [f">{label}</text>" in chart for label in ("0", "0.5", "1", "1.5", "2")] == [True, False] * 2 + [
        True
    ]


def test_one_round_is_drawn_as_a_dot() -> None:
    chart = line_chart([Line("a", [(1, 3.0)])], "loss", "round", "loss").wide
    first, second = chart.partition('points="')[2].partition('"')[0].split()
    assert first == second
