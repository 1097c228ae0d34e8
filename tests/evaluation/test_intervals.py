"""Intervals: Wilson's formula for shares, the paired bootstrap for differences."""

import math

import pytest

from fedllm.evaluation.intervals import difference, estimate
from fedllm.evaluation.task import Ratio, share


@pytest.mark.parametrize(("count", "number"), [(0, 20), (13, 20), (20, 20)])
def test_a_share_has_wilsons_interval(count: int, number: int) -> None:
    found = estimate(share([True] * count + [False] * (number - count)))
    z, p = 1.959964, count / number
    middle = (p + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(p * (1 - p) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    assert (found.value, found.low, found.high) == pytest.approx((p, middle - half, middle + half), abs=1e-6)


def test_the_interval_of_a_ratio_holds_its_value() -> None:
    found = estimate(Ratio([10.0, 30.0, 22.0, 18.0], [10, 10, 10, 10]))
    assert found.low < found.value == 2.0 < found.high


def test_what_makes_items_hard_for_both_cancels_out() -> None:
    hard = [float(place) for place in range(40)]
    first, second = Ratio(hard, [1.0] * 40), Ratio([value + 0.5 for value in hard], [1.0] * 40)
    found = difference(second, first)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert estimate(first).high - estimate(first).low > 5


def test_a_real_difference_is_beyond_zero() -> None:
    first, second = share([False] * 30 + [True] * 30), share([True] * 20 + [False] * 10 + [True] * 30)
    found = difference(second, first)
    assert found.value == pytest.approx(1 / 3)
    assert 0 < found.low < found.value < found.high
    assert difference(first, first).high == 0.0
