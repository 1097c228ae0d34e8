"""What a study found: every method's losses, costs and gains over training alone, as `study.json` has them.

A method's loss for a client is its mean over the seeds. Losses are in nats per learnt token, on rows that
chose nothing. `gap_closed` is the share of the way from the base model to centralised training; its interval
comes from a bootstrap over the clients, which are few: it says how much the answer hangs on who they are.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, TypeAlias

import numpy as np

from fedllm.runs.spread import spread_of
from scripts.studies.cells import Done, Study
from scripts.studies.trials import Outcome

Summary: TypeAlias = dict[str, Any]
Losses: TypeAlias = Mapping[str, float]
_RESAMPLES = 2000


def study_json(study: Study, done: Done) -> Summary:
    """Return the whole of `study.json`."""
    finished = [outcome for outcome in done.outcomes if outcome.is_done]
    return {
        "name": study.name,
        "seeds": list(study.seeds),
        "rates": list(study.rates),
        "cells": [_cell(outcome) for outcome in finished],
        "summary": _summary(study.methods, finished),
        "tried": [
            {**_labels(outcome), "choosing": outcome.figures["choosing"]}
            for outcome in done.tried
            if outcome.is_done
        ],
        "failed": [
            {**_labels(one), "reason": one.reason}
            for one in (*done.tried, *(other for other in done.outcomes if other not in done.tried))
            if one.reason
        ],
    }


def _labels(outcome: Outcome) -> dict[str, Any]:
    return {name: outcome.trial.labels[name] for name in ("method", "seed", "rate")}


def _cell(outcome: Outcome) -> dict[str, Any]:
    figures = outcome.figures
    return {
        **_labels(outcome),
        "tokens": figures["tokens"],
        "steps": figures["steps"],
        "clients": figures["clients"],
        "at_equal_tokens": {name: _finite(loss) for name, loss in figures["last"].items()},
        "others": {name: _finite(loss) for name, loss in figures["others"].items()},
        "bytes_up": figures.get("bytes_up", 0),
        "seconds": round(outcome.seconds, 2),
        "epsilon": figures.get("epsilon"),
    }


def _summary(methods: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Summary]:
    by_method = {
        method: found
        for method in methods
        if (found := [outcome for outcome in outcomes if outcome.trial.labels["method"] == method])
    }
    best, last, others = (
        {method: _mean_of(found, part) for method, found in by_method.items()}
        for part in ("clients", "last", "others")
    )
    return {
        method: {
            **_spread(found, best[method]),
            "clients": best[method],
            "gained_over_alone": _gained(best, method),
            "at_equal_tokens": {"mean": _mean(last[method]), "gained_over_alone": _gained(last, method)},
            "others": {
                "mean": _mean(others[method]),
                "no_worse_than_alone": _gained(others, method, or_equal=True),
            },
            "gap_closed": _gap_closed(best, method),
            "bytes": fmean(one.figures.get("bytes_up", 0) for one in found),
            "seconds": round(fmean(one.seconds for one in found), 2),
            "epsilon": max((one.figures.get("epsilon") or 0.0 for one in found), default=0.0) or None,
            "tokens": round(fmean(one.figures["tokens"] for one in found)),
            "steps": fmean(one.figures["steps"] for one in found),
            "rate": found[0].trial.labels["rate"],
        }
        for method, found in by_method.items()
    }


def _mean_of(outcomes: Sequence[Outcome], part: str) -> dict[str, float]:
    """Return the mean over seeds of each client's losses; of clients that every seed has measured."""
    all_losses = [outcome.figures[part] for outcome in outcomes]
    names = sorted(set.intersection(*(set(losses) for losses in all_losses)))
    return {name: fmean(losses[name] for losses in all_losses) for name in names}


def _spread(outcomes: Sequence[Outcome], losses: Losses) -> dict[str, Any]:
    means = [fmean(outcome.figures["clients"].values()) for outcome in outcomes]
    spread = spread_of(losses)
    return {
        "mean": fmean(means),
        "deviation": stdev(means) if len(means) > 1 else None,  # over seeds
        "worst": {"client": spread.worst_client, "loss": spread.worst},
    }


def _gained(losses: Mapping[str, Losses], method: str, *, or_equal: bool = False) -> float | None:
    """Return the share of clients with a lower loss than alone; None for what cannot be compared."""
    changes = _changes(losses, method)
    if not changes:
        return None
    return fmean(change < 0 or (or_equal and change == 0) for change in changes.values())


def _changes(losses: Mapping[str, Losses], method: str) -> dict[str, float]:
    """Return how much a method's losses are above those of training alone; {} for alone itself."""
    return changes(losses.get("alone", {}), losses[method]) if method not in ("base", "alone") else {}


def changes(before: Losses, after: Losses) -> dict[str, float]:
    """Return by client how much `after` is above `before`, of the clients that both have."""
    return {name: after[name] - before[name] for name in sorted(before.keys() & after.keys())}


def _gap_closed(losses: Mapping[str, Losses], method: str) -> dict[str, float] | None:
    """Return the share of the way from base to centralised, with a 95 % interval; None without both."""
    base, centralised = losses.get("base", {}), losses.get("centralised", {})
    if method in ("base", "centralised") or not (base and centralised):
        return None
    names = sorted(losses[method].keys() & base.keys() & centralised.keys())
    values_3C = np.array([[part[name] for name in names] for part in (base, losses[method], centralised)])
    draws_RC = np.random.default_rng(0).integers(len(names), size=(_RESAMPLES, len(names)))
    resampled_3R = values_3C[:, draws_RC].mean(axis=-1)
    whole, shares_R = _share(values_3C.mean(axis=-1)), _share(resampled_3R)
    low, high = np.percentile(shares_R, [2.5, 97.5])
    found = {"value": float(whole), "low": float(low), "high": float(high)}
    return found if all(map(math.isfinite, found.values())) else None


def _share(means_3: Any) -> Any:
    base, own, centralised = means_3
    with np.errstate(divide="ignore", invalid="ignore"):
        return (base - own) / (base - centralised)


def _mean(losses: Losses) -> float | None:
    return _finite(fmean(losses.values())) if losses else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
