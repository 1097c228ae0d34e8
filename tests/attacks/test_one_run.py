"""One-run auditing: the published bound, and that it holds where the mechanism is known."""

import math
from fractions import Fraction

import numpy as np
import pytest

from fedllm.attacks.one_run import MAX_EPSILON, Guesses, epsilon_lower_bound, guess, p_value


@pytest.mark.parametrize(
    ("guessed", "right", "epsilon"),
    [(1000, 600, 0.30), (200, 160, 1.09), (100, 95, 2.17), (100, 100, 3.49), (40, 40, 2.55)],
)
def test_the_power_table_of_one_run(guessed: int, right: int, epsilon: float) -> None:
    assert round(epsilon_lower_bound(Guesses(1000, guessed, right)), 2) == epsilon


def test_all_right_has_a_closed_form() -> None:
    # (e^eps / (1 + e^eps))^r = beta
    success = 0.05 ** (1 / 100)
    assert epsilon_lower_bound(Guesses(100, 100, 100)) == pytest.approx(math.log(success / (1 - success)))


def plain_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The algorithm of the paper's appendix D, term by term, with binomials in exact arithmetic."""
    p = Fraction(1 / (1 + math.exp(-epsilon)))
    chances = [math.comb(r, k) * p**k * (1 - p) ** (r - k) for k in range(r + 1)]
    alpha = total = Fraction(0)
    for i in range(1, v + 1):
        total += chances[v - i]
        alpha = max(alpha, total / i)
    return min(1.0, float(sum(chances[v:]) + alpha * Fraction(delta) * 2 * m))


@pytest.mark.parametrize(("m", "r", "v"), [(1000, 200, 160), (50, 50, 30), (10, 4, 4), (10, 4, 0)])
def test_the_general_form_is_the_papers_term_by_term(m: int, r: int, v: int) -> None:
    for epsilon in (0.0, 0.5, 2.0, 6.0):
        for delta in (0.0, 1e-6, 1e-3):
            found = p_value(Guesses(m, r, v), epsilon, delta)
            assert found == pytest.approx(plain_p_value(m, r, v, epsilon, delta), rel=1e-9)


def test_delta_weakens_the_bound_and_at_zero_is_the_plain_one() -> None:
    guesses = Guesses(1000, 200, 160)
    bounds = [epsilon_lower_bound(guesses, delta=delta) for delta in (0.0, 1e-5, 1e-4, 1e-2)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == epsilon_lower_bound(guesses)
    assert bounds[1] > 1.05
    assert bounds[3] == 0


def test_at_the_bound_the_chance_is_what_confidence_leaves() -> None:
    for guesses in (Guesses(300, 100, 80), Guesses(300, 300, 200)):
        for delta in (0.0, 1e-6):
            bound = epsilon_lower_bound(guesses, delta=delta, confidence=0.9)
            assert 0 < bound < MAX_EPSILON
            assert p_value(guesses, bound, delta) == pytest.approx(0.1)


def test_guessing_no_better_than_a_coin_refutes_nothing() -> None:
    assert epsilon_lower_bound(Guesses(100, 100, 50)) == 0
    assert epsilon_lower_bound(Guesses(100, 0, 0)) == 0


def test_the_bound_holds_and_is_not_vacuous_for_random_response() -> None:
    """Each coin is told truly with chance e^eps / (1 + e^eps): eps-DP, and as much as eps-DP can tell."""
    epsilon, generator = 2.0, np.random.default_rng(0)
    truth = 1 / (1 + math.exp(-epsilon))
    bounds = []
    for _ in range(200):
        num_right = int(generator.binomial(1000, truth))
        bounds.append(epsilon_lower_bound(Guesses(1000, 1000, num_right)))
    assert np.mean(np.array(bounds) > epsilon) < 0.1  # 5 % are expected
    assert np.median(bounds) > 0.85 * epsilon


def test_guesses_take_the_ends_of_the_scores() -> None:
    scores, included = [5.0, 1.0, 4.0, 2.0, 3.0], [True, True, False, False, True]
    assert guess(scores, included, num_in=2, num_out=2) == Guesses(5, 4, 2)
    assert guess(scores, included, num_in=1, num_out=0) == Guesses(5, 1, 1)
    assert guess(scores, included, num_in=0, num_out=0) == Guesses(5, 0, 0)


def test_impossible_guesses_are_refused() -> None:
    with pytest.raises(ValueError, match="3 right of 2"):
        Guesses(5, 2, 3)
    for scores, number in (([1.0], 2), ([math.nan], 1), ([1.0, 2.0], 1)):
        with pytest.raises(ValueError, match="every canary"):
            guess(scores, [True], num_in=number, num_out=0)
    with pytest.raises(ValueError, match="no probability"):
        epsilon_lower_bound(Guesses(1, 1, 1), confidence=1.0)
