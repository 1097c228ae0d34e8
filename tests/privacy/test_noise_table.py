"""The table gives the exact law: cell by cell in rational arithmetic, and in draws against the plain twin."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import chi2, chi2_contingency

from fedllm.privacy.noise import SecretStream, discrete_gaussian
from fedllm.privacy.noise_table import cumulative_table, tabled_gaussian

KEY = bytes(range(32))


def exponential(power: Fraction) -> Fraction:
    """Return exp(-power) to 10^-50: the series, for a power halved until it is small, and squared again."""
    halvings = max(0, power.numerator // power.denominator).bit_length() + 2
    small, term, total = power / 2**halvings, Fraction(1), Fraction(0)
    for count in range(1, 50):
        total, term = total + term, cut(-term * small / count)
    for _ in range(halvings):
        total = cut(total * total)
    return total


def cut(number: Fraction) -> Fraction:
    return Fraction(int(number * 2**300), 2**300)


def law(variance: int, most: int) -> list[Fraction]:
    """Return the chance of each size 0, 1, ..., most, to 10^-50."""
    weights = [exponential(Fraction(k * k, 2 * variance)) * (2 if k else 1) for k in range(most + 1)]
    total = sum(weights)
    return [cut(weight / total) for weight in weights]


@pytest.mark.parametrize("variance", [1, 7, 40])
def test_every_entry_is_the_floor_of_the_exact_chance(variance: int) -> None:
    chances = law(variance, 16 * int(variance**0.5 + 1))
    table = cumulative_table(variance, 63)
    exact = [int(sum(chances[: k + 1], Fraction(0)) * 2**63) for k in range(len(table))]
    assert table[:-1] == exact[:-1]
    assert table[-1] == 2**63 - 1  # the end of a cut law is 1 there


def test_a_settled_number_leaves_no_other_value() -> None:
    """All U that share the first bits are in one cell of the law; the others are settled by more bits."""
    variance, bits = 5, 10
    chances = law(variance, 40)
    below = [sum(chances[:k], Fraction(0)) * 2**bits for k in range(42)]
    table = cumulative_table(variance, bits)
    unsettled = 0
    for first in range(2**bits):
        size = int(np.searchsorted(table, first))
        if table[size] == first:
            unsettled += 1
        else:
            assert below[size] <= first
            assert first + 1 <= below[size + 1]
    assert 0 < unsettled <= len(table)


def fits(values: np.ndarray) -> float:
    """Return the chance of so large a chi-square where the variance is 9; from 10 on, values count as one."""
    sizes = np.array([float(chance) for chance in law(9, 30)])
    expected = np.append(np.concatenate([sizes[9:0:-1] / 2, sizes[:1], sizes[1:10] / 2]), sizes[10:].sum())
    places = np.where(np.abs(values) < 10, values + 9, 19)
    counts, wanted = np.bincount(places, minlength=20), expected * len(values)
    return float(chi2.sf(((counts - wanted) ** 2 / wanted).sum(), 19))


@pytest.mark.parametrize("bits", [63, 6])
def test_draws_have_the_law_however_many_are_settled_late(bits: int) -> None:
    """With 6 bits a tenth of all values need a second look."""
    values = tabled_gaussian(SecretStream(KEY), 40_000, 9, table_bits=bits)
    assert fits(values) > 1e-3


def wrong_sign(values: np.ndarray) -> np.ndarray:
    return np.abs(values)


def two_signs_of_zero(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, values[values == 0]])


def cut_tail(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -6, 6)


@pytest.mark.parametrize("broken", [wrong_sign, two_signs_of_zero, cut_tail])
def test_a_wrong_sampler_does_not_fit(broken: Callable[[np.ndarray], np.ndarray]) -> None:
    assert fits(broken(tabled_gaussian(SecretStream(KEY), 40_000, 9))) < 1e-6


def test_the_plain_twin_draws_alike() -> None:
    fast = np.clip(tabled_gaussian(SecretStream(KEY), 6_000, 4), -5, 5)
    plain = np.clip(discrete_gaussian(SecretStream(KEY), 6_000, Fraction(4)), -5, 5)
    counts = [np.bincount(values + 5, minlength=11) for values in (fast, plain)]
    assert chi2_contingency(counts).pvalue > 1e-3


def test_a_wide_law_has_its_moments() -> None:
    number, deviation = 200_000, 5000
    values = tabled_gaussian(SecretStream(KEY), number, deviation**2) / deviation
    assert abs(values.mean()) < 3.29 / number**0.5
    assert abs((values**2).mean() - 1) < 3.29 * (2 / number) ** 0.5
    assert abs((values**4).mean() - 3) < 3.29 * (96 / number) ** 0.5
