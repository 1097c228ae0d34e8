"""A lower bound on epsilon from one training run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

Each of m canaries is included by a fair coin of its own. After the run the auditor guesses some coins. More
right guesses than (epsilon, delta) allows refute that claim, with the confidence asked for. How many coins to
guess is decided before any guess is checked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import bdtrc

from fedllm.attacks.canaries import Canary

MAX_EPSILON = 100.0  # e^100 to 1: any guess that may be wrong is refuted long before


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


def guess_canaries(
    canaries: Sequence[Canary], losses: Sequence[float], base_losses: Sequence[float], share: float = 1.0
) -> Guesses:
    """Return the guesses at the coins of canaries, from how far each loss fell below the base model's.

    Half of `share` of the canaries are guessed in, half out.
    """
    scores = [base - loss for loss, base in zip(losses, base_losses, strict=True)]
    each = int(share * len(canaries)) // 2
    return guess(scores, [one.included for one in canaries], num_in=each, num_out=each)


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
    tails = bdtrc(np.arange(v - 1, -2, -1), r, success)  # P[Bin >= v - i], i = 0 to v
    chance = tails[0]
    if delta > 0 and v > 0:
        # Upper tails: where their difference cancels it is small next to the chance, so nothing is lost.
        below = tails[1:] - tails[0]
        chance += 2 * guesses.num_canaries * delta * (below / np.arange(1, v + 1)).max()
    return min(1.0, float(chance))


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
    # The chance grows with epsilon, to 1: there is one epsilon at which it is what the confidence leaves.
    return float(brentq(lambda epsilon: p_value(guesses, epsilon, delta) - miss, 0.0, MAX_EPSILON))
