"""How sure a figure is: Wilson's interval of a share, and the bootstrap over items of everything else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap

from fedllm.evaluation.task import Ratio

CONFIDENCE = 0.95
_RESAMPLES, _AT_ONCE = 2000, 200


@dataclass(frozen=True)
class Estimate:
    """A figure and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(ratio: Ratio) -> Estimate:
    """Return a figure with its interval; at least two items.

    Of a share of items it is Wilson's (1927), which holds for small numbers and near 0 and 1. Tokens of one
    text depend on each other, so of any other figure whole items are drawn anew: the percentile bootstrap.
    """
    if set(ratio.bottoms) == {1.0} and set(ratio.tops) <= {0.0, 1.0}:
        found = binomtest(int(sum(ratio.tops)), len(ratio.tops)).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(ratio.value, float(found.low), float(found.high))
    low, high = _bootstrap(lambda top, bottom: top / bottom, ratio.tops, ratio.bottoms)
    return Estimate(ratio.value, low, high)


def difference(ratio: Ratio, first: Ratio) -> Estimate:
    """Return a figure minus the same of another adapter on the same items, with its interval.

    Both are drawn anew by the same items: what makes an item hard for both cancels out.
    """
    columns = (ratio.tops, ratio.bottoms, first.tops, first.bottoms)
    low, high = _bootstrap(lambda a, b, c, d: a / b - c / d, *columns)
    return Estimate(ratio.value - first.value, low, high)


def _bootstrap(figure: Callable[..., Any], *columns: Any) -> tuple[float, float]:
    """Return the bounds of a figure of the sums of columns, by 2,000 draws of items from a fixed seed."""

    def of_sums(*drawn: Any, axis: int) -> Any:
        return figure(*(column.sum(axis=axis) for column in drawn))

    found = bootstrap(
        tuple(np.asarray(column, dtype=float) for column in columns),
        of_sums,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=_AT_ONCE,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
