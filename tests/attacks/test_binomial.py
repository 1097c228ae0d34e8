"""Clopper-Pearson bounds, against exact fractions and closed forms."""

from fractions import Fraction
from math import comb

import pytest

from fedllm.attacks.binomial import clopper_pearson


def at_least(count: int, number: int, success: float) -> float:
    """Return P[Bin(number, success) >= count] in exact arithmetic."""
    p = Fraction(success)
    return float(sum(comb(number, k) * p**k * (1 - p) ** (number - k) for k in range(count, number + 1)))


@pytest.mark.parametrize(("count", "number"), [(0, 20), (3, 20), (20, 20), (1, 300), (150, 300)])
def test_bounds_leave_half_of_the_miss_on_either_side(count: int, number: int) -> None:
    low, high = clopper_pearson(count, number, 0.9)
    assert low <= count / number <= high
    assert low == 0 if count == 0 else at_least(count, number, low) == pytest.approx(0.05, rel=1e-10)
    beyond = 1 - at_least(count + 1, number, high)
    assert high == 1 if count == number else beyond == pytest.approx(0.05, rel=1e-10)


def test_bounds_of_none_and_of_all_have_closed_forms() -> None:
    assert clopper_pearson(0, 10)[1] == pytest.approx(1 - 0.025 ** (1 / 10))
    assert clopper_pearson(10, 10)[0] == pytest.approx(0.025 ** (1 / 10))
    assert clopper_pearson(0, 0) == (0, 1)


@pytest.mark.parametrize(("count", "number", "confidence"), [(3, 2, 0.9), (-1, 2, 0.9), (1, 2, 1.0)])
def test_impossible_counts_and_confidences_are_refused(count: int, number: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=f"{count} of {number}"):
        clopper_pearson(count, number, confidence)
