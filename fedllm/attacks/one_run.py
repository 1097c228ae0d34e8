"""A lower bound on epsilon from one training run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

Every one of m canaries is included by its own fair coin. After the run the auditor guesses some coins; more
right guesses than the claimed (epsilon, delta) allows refute the claim at the confidence asked for. The
auditor decides how many coins to guess before it sees which guesses are right.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.attacks.binomial import at_least, probabilities, rising_root

MAX_EPSILON = 100.0


@dataclass(frozen=True)
class Guesses:
    """The auditor's guesses: of `num_canaries` coins `num_guessed` were guessed and `num_right` are right."""

    num_canaries: int
    num_guessed: int
    num_right: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_right <= self.num_guessed <= self.num_canaries:
            raise ValueError(
                f"{self.num_right} right of {self.num_guessed} guesses at {self.num_canaries} coins"
            )


def guess(scores: Sequence[float], included: Sequence[bool], *, num_in: int, num_out: int) -> Guesses:
    """Return how right it is to guess `num_in` canaries of the highest scores in, `num_out` lowest out.

    A score is larger where a canary is more likely in. Canaries of one score are taken in their order, which
    must not depend on the coins.

    Raises:
        ValueError: a score is not a number, or there are fewer canaries than guesses.
    """
    if len(scores) != len(included) or num_in + num_out > len(scores) or not np.isfinite(scores).all():
        raise ValueError("every canary needs a finite score and a coin, and at most one guess")
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    coins = np.asarray(included, bool)[order]
    num_right = int(coins[:num_in].sum()) + int((~coins[len(coins) - num_out :]).sum())
    return Guesses(len(coins), num_in + num_out, num_right)


def p_value(guesses: Guesses, epsilon: float, delta: float = 0.0) -> float:
    """Return a bound on the chance of so many right guesses under (epsilon, delta)-DP.

    With delta 0 it is P[Bin(r, e^eps / (1 + e^eps)) >= v]: no guess is better than randomised response.
    Otherwise 2 m delta max_i P[v > Bin >= v - i] / i is added, for i from 1 to v (Theorem 5.2).
    """
    v, r = guesses.num_right, guesses.num_guessed
    success = 1 / (1 + math.exp(-epsilon))
    chance = at_least(v, r, success)
    if delta > 0 and v > 0:
        below = np.cumsum(probabilities(r, success)[v - 1 :: -1])  # P[v > Bin >= v - i], i = 1 to v
        chance += 2 * guesses.num_canaries * delta * float((below / np.arange(1, v + 1)).max())
    return min(1.0, chance)


def epsilon_lower_bound(guesses: Guesses, *, delta: float = 0.0, confidence: float = 0.95) -> float:
    """Return the largest epsilon that the guesses refute with the confidence given, 0 if none.

    Raises:
        ValueError: the confidence is not between 0 and 1, or delta is no probability.
    """
    if not 0 < confidence < 1 or not 0 <= delta <= 1:
        raise ValueError(f"confidence {confidence} or delta {delta} is no probability")
    miss = 1 - confidence
    if p_value(guesses, 0.0, delta) > miss:
        return 0.0
    return rising_root(lambda epsilon: p_value(guesses, epsilon, delta) - miss, 0.0, MAX_EPSILON)
