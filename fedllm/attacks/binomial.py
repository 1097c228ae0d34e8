"""Exact binomial tails and Clopper-Pearson bounds, from sums of logarithms."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def probabilities(number: int, success: float) -> Floats:
    """Return P[Bin(number, success) = k] for k = 0 to number, [number + 1]."""
    counts = np.arange(number + 1)
    if success <= 0 or success >= 1:
        return np.asarray(counts == (number if success >= 1 else 0), np.float64)
    steps = np.log(np.arange(number, 0, -1)) - np.log(np.arange(1, number + 1))
    log_choices = np.concatenate([[0.0], np.cumsum(steps)])
    logs = log_choices + counts * math.log(success) + (number - counts) * math.log1p(-success)
    return np.asarray(np.exp(logs))


def at_least(count: int, number: int, success: float) -> float:
    """Return P[Bin(number, success) >= count]."""
    return min(1.0, float(probabilities(number, success)[max(count, 0) :].sum()))


def clopper_pearson(count: int, number: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided interval of a share of which `count` of `number` were seen.

    (Clopper and Pearson, Biometrika 26, 1934.) Without a trial it is (0, 1).

    Raises:
        ValueError: more were seen than tried, or the confidence is not between 0 and 1.
    """
    if not 0 <= count <= number or not 0 < confidence < 1:
        raise ValueError(f"{count} of {number} at confidence {confidence}")
    miss = (1 - confidence) / 2
    lower = rising_root(lambda share: at_least(count, number, share) - miss) if count else 0.0
    upper = 1.0
    if count < number:
        upper = rising_root(lambda share: miss - (1 - at_least(count + 1, number, share)))
    return lower, upper


def rising_root(function: Callable[[float], float], low: float = 0.0, high: float = 1.0) -> float:
    """Return the largest point found where a rising function is not above zero, by 60 halvings."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) > 0:
            high = middle
        else:
            low = middle
    return low
