"""Drift: has a client's held-out loss risen against its own history?

A self-starting CUSUM (Hawkins 1987, The Statistician 36:299). Each loss is compared with the mean and the
deviation of the client's earlier ones by Student's t, which is then expressed as a standard normal value u
(Quesenberry 1991, J. Quality Technology 23:213). While the losses are independent and normal with any fixed
mean and deviation, the values u are exactly independent standard normal ones, so no training period and no
assumed level is needed. The chart sums up what exceeds half a deviation,

    S = max(0, S + u - 1/2),

and gives an alarm where S passes a bound. The bound follows from the wanted mean number of losses between
two false alarms (Siegmund 1985, Sequential Analysis).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from scipy.optimize import brentq
from scipy.special import ndtri, stdtr

_ALLOWANCE = 0.5  # deviations of a rise that are not counted: the best for finding a rise of one deviation
_OVERSHOOT = 1.166  # Siegmund's correction: S jumps past its bound
# A normal value above it has a chance below 1e-15; an earlier history without spread would give infinity.
_MOST = 8.0


@dataclass(frozen=True)
class Chart:
    """A client's chart: number, mean and sum of squared deviations of its losses so far, and S."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    sum: float = 0.0

    def moved(self, change: float) -> "Chart":
        """Return the chart as if all losses so far had been larger by `change`.

        So a history goes on under a new adapter whose gain for this client is known.
        """
        return replace(self, mean=self.mean + change)


@dataclass(frozen=True)
class DriftRule:
    """When a rise is an alarm: every `rounds` measurements of the federation there is one false alarm.

    `least` (nats per token) counts as one deviation at least: where an unchanged adapter is measured on
    unchanged rows, the history has no spread and any rise would be infinitely many deviations. It only ever
    lowers a chart, so false alarms do not become more frequent.
    """

    rounds: float = 1000.0
    least: float = 0.02

    def bound(self, num_clients: int) -> float:
        """Return the S above which a chart gives an alarm; the clients share the allowed false alarms."""
        return _bound_for(self.rounds * max(1, num_clients))


@lru_cache(maxsize=64)
def _bound_for(length: float) -> float:
    """Return the bound that a chart without drift passes every `length` losses in the mean."""

    def excess(bound: float) -> float:
        exponent = 2 * _ALLOWANCE * (bound + _OVERSHOOT)
        return (math.exp(exponent) - exponent - 1) / (2 * _ALLOWANCE**2) - length

    return float(brentq(excess, 0.0, 100.0)) if excess(0.0) < 0 else 0.0


def add_losses(
    charts: Mapping[str, Chart], losses: Mapping[str, float], rule: DriftRule
) -> tuple[dict[str, Chart], tuple[str, ...]]:
    """Return the charts with one more loss of each client (nats per token), and the clients that drifted.

    The chart of a client that drifted begins anew: its history is of text that it has no longer.
    """
    bound = rule.bound(len(losses))
    after = {client: _with_loss(charts.get(client, Chart()), loss, rule) for client, loss in losses.items()}
    drifted = tuple(sorted(client for client, chart in after.items() if chart.sum > bound))
    return {**charts, **after, **dict.fromkeys(drifted, Chart())}, drifted


def _with_loss(chart: Chart, loss: float, rule: DriftRule) -> Chart:
    count, distance = chart.count + 1, loss - chart.mean
    mean = chart.mean + distance / count  # Welford's update: no difference of large sums
    squares = chart.squares + distance * (loss - mean)
    total = chart.sum
    if chart.count >= 2:  # one loss has no deviation
        total = max(0.0, total + _as_normal(chart, distance, rule.least) - _ALLOWANCE)
    return Chart(count, mean, squares, total)


def _as_normal(chart: Chart, distance: float, least: float) -> float:
    """Return by how many deviations a loss is above its history, at most so many as `least` allows."""
    freedom, spread = chart.count - 1, math.sqrt(1 + 1 / chart.count)  # of a new loss about the mean
    deviation = math.sqrt(chart.squares / freedom)
    by_least = distance / (least * spread) if least else math.copysign(_MOST, distance)
    if not deviation:
        return min(_MOST, by_least)
    normal = -float(ndtri(stdtr(freedom, -distance / (deviation * spread))))
    return max(-_MOST, min(_MOST, normal, by_least if distance > 0 else normal))
