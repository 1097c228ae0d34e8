"""Binomial tails and Clopper-Pearson bounds, against exact fractions and the defining equations."""

from fractions import Fraction
from math import comb

import pytest

from fedllm.attacks.binomial import at_least, clopper_pearson, probabilities, rising_root


@pytest.mark.parametrize(
    ("number", "success"), [(1, Fraction(1, 2)), (9, Fraction(1, 3)), (40, Fraction(7, 8))]
)
def test_probabilities_and_tails_are_those_of_exact_arithmetic(number: int, success: Fraction) -> None:
    exact = [comb(number, k) * success**k * (1 - success) ** (number - k) for k in range(number + 1)]
    assert probabilities(number, float(success)) == pytest.approx([float(one) for one in exact], rel=1e-10)
    for count in range(number + 2):
        assert at_least(count, number, float(success)) == pytest.approx(float(sum(exact[count:])), abs=1e-12)


def test_a_sure_and_an_impossible_success() -> None:
    assert probabilities(3, 0.0).tolist() == [1, 0, 0, 0]
    assert probabilities(3, 1.0).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("count", "number"), [(0, 20), (3, 20), (20, 20), (1, 1000), (500, 1000)])
def test_bounds_leave_half_of_the_miss_on_either_side(count: int, number: int) -> None:
    low, high = clopper_pearson(count, number, 0.9)
    assert low <= count / number <= high
    assert low == 0 if count == 0 else at_least(count, number, low) == pytest.approx(0.05)
    assert high == 1 if count == number else 1 - at_least(count + 1, number, high) == pytest.approx(0.05)


def test_known_bounds() -> None:
    assert clopper_pearson(0, 10)[1] == pytest.approx(1 - 0.025 ** (1 / 10))  # the closed form at zero
    assert clopper_pearson(10, 10)[0] == pytest.approx(0.025 ** (1 / 10))
    assert clopper_pearson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="3 of 2"):
        clopper_pearson(3, 2)


def test_a_rising_root_is_found_to_rounding() -> None:
    assert rising_root(lambda x: x * x - 2, 0.0, 2.0) == pytest.approx(2**0.5)
