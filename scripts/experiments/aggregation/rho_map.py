"""Study B: when does it matter that the mean of factors is not the mean of their products?

Runs of the two read-outs that differ in nothing else, over clients x local steps x learning rate x skew.
`rho` is the error of averaging factors as a share of the round's change; `gap` is how much higher the
held-out loss of factor averaging ends, mean over clients.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.key import Scalar
from scripts.experiments.runs import mean_of
from scripts.studies.trials import Figures, Outcome, RunTrials, Trial

FACTORS, EXACT = "factor-mean", "svd"
IID, DOMAIN = "iid", "domain"
BANDS = (0.1, 0.3)  # of rho, where the summary is cut


@dataclass(frozen=True)
class MapGrid:
    """The points of the map; `flat` holds the keys of its runs."""

    flat: Mapping[str, Scalar]
    clients: tuple[int, ...]
    local_steps: tuple[int, ...]
    rates: tuple[float, ...]
    skews: tuple[str, ...]
    seeds: tuple[int, ...]


def map_study(grid: MapGrid, do: RunTrials) -> Figures:
    """Do every pair of runs and return the points of the map with a summary."""
    points = list(itertools.product(grid.clients, grid.local_steps, grid.rates, grid.skews, grid.seeds))
    outcomes = do([_trial(grid, *point, read_out) for point in points for read_out in (FACTORS, EXACT)])
    found = [_point(factors, exact) for factors, exact in zip(outcomes[::2], outcomes[1::2], strict=True)]
    done = [point for point in found if "gap" in point]
    return {
        "points": found,
        "summary": summary(done),
        "tokens": [min(tokens := [p["tokens"] for p in done]), max(tokens)] if done else [],
    }


def _trial(
    grid: MapGrid, clients: int, steps: int, rate: float, skew: str, seed: int, read_out: str
) -> Trial:
    labels: dict[str, Scalar] = {"clients": clients, "steps": steps, "rate": rate, "skew": skew, "seed": seed}
    keys: dict[str, Scalar] = {
        "federation.num-clients": clients,
        "train.local-steps": steps,
        "train.learning-rate": rate,
        "data.partition": "iid" if skew == IID else f"column:group-{clients}",
        "aggregation.read-out": read_out,
        "seed": seed,
    }
    return Trial("rho map", "federation", {**labels, "read-out": read_out}, {**grid.flat, **keys})


def _point(factors: Outcome, exact: Outcome) -> Figures:
    """Return one point of the map; without `gap` where one of the two runs did not end."""
    point: Figures = {name: value for name, value in factors.trial.labels.items() if name != "read-out"}
    reasons = sorted({outcome.reason for outcome in (factors, exact) if outcome.reason})
    if reasons:
        return {**point, "reasons": reasons}
    return {
        **point,
        "rho": mean_of(factors.figures, "rho"),
        "rho_exact": mean_of(exact.figures, "rho"),
        "first_rho": factors.figures["rho"][0],  # both runs share round 1, so this one is of both
        "kept": mean_of(exact.figures, "kept"),
        "loss_before": factors.figures["mean_before"],
        "loss_factors": factors.figures["mean_after"],
        "loss_exact": exact.figures["mean_after"],
        "gap": factors.figures["mean_after"] - exact.figures["mean_after"],
        "tokens": factors.figures["tokens"],
    }


def summary(points: Sequence[Figures]) -> Figures:
    """Return how gap goes with rho: rank correlation, the mean of each axis value, and of bands of rho."""
    if not points:
        return {}
    rho, gap = [point["rho"] for point in points], [point["gap"] for point in points]
    axes = {
        axis: {
            str(value): {
                "rho": statistics.fmean(p["rho"] for p in points if p[axis] == value),
                "gap": statistics.fmean(p["gap"] for p in points if p[axis] == value),
            }
            for value in dict.fromkeys(point[axis] for point in points)
        }
        for axis in ("clients", "steps", "rate", "skew")
    }
    return {"rank_correlation": rank_correlation(rho, gap), "axes": axes, "bands": _bands(points)}


def _bands(points: Sequence[Figures]) -> Figures:
    edges = (-math.inf, *BANDS, math.inf)
    found: Figures = {}
    for low, high in itertools.pairwise(edges):
        gaps = [point["gap"] for point in points if low <= point["rho"] < high]
        name = (
            f"below {high:g}"
            if math.isinf(low)
            else f"{low:g} and above"
            if math.isinf(high)
            else f"{low:g} to {high:g}"
        )
        if gaps:
            found[name] = {
                "points": len(gaps),
                "mean_gap": statistics.fmean(gaps),
                "median_gap": statistics.median(gaps),
                "exact_better": sum(gap > 0 for gap in gaps) / len(gaps),
            }
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 where one of the two does not vary."""
    ranks = [_ranks(values) for values in (first, second)]
    if any(len(set(values)) < 2 for values in ranks):
        return 0.0
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of every value from 1, ties sharing the mean of theirs."""
    ordered = sorted(values)
    return [(ordered.index(value) + 1 + len(ordered) - ordered[::-1].index(value)) / 2 for value in values]
