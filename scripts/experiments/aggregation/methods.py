"""Study A: every aggregation method on clients of unlike text, compared with training that is not federated.

The learning rate is a method's own: the one of `rates` with the least mean held-out loss on the tuning seed,
which is not among the seeds reported. Two more parts reuse those rates without tuning again: clients with a
Dirichlet mixture of domains, and clients of different ranks.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.config.key import Scalar
from scripts.experiments.runs import mean_of
from scripts.reports import mean_and_sd
from scripts.studies.trials import Figures, Outcome, RunTrials, Trial

METHODS: dict[str, Mapping[str, Scalar]] = {
    name: {"aggregation.preset": name}
    for name in ("fedit", "ffa", "rolora", "flexlora", "fedex", "flora", "lora-fair", "fedsa", "hetlora")
}
# Each client alone has a preset that does not matter; one-shot is FlexLoRA with all steps in one round.
LOCAL_ONLY, POOLED, ONE_SHOT = "local only", "centralised", "one-shot"
CONTROLS = (LOCAL_ONLY, POOLED, ONE_SHOT)
DOMAIN, DIRICHLET, RANKS = "domain", "dirichlet", "mixed ranks"
_KINDS = {LOCAL_ONLY: "alone", POOLED: "pooled"}


@dataclass(frozen=True)
class MethodsGrid:
    """What study A compares: `flat` holds the keys of all its runs, `methods` those of each method.

    Rounds and local steps are among the former: one-shot needs their product.
    A single rate is taken as it is. The parts `dirichlet` and `ranks` are left out where they set no key.
    """

    flat: Mapping[str, Scalar]
    rates: tuple[float, ...]
    tuning_seed: int
    seeds: tuple[int, ...]
    methods: Mapping[str, Mapping[str, Scalar]] = field(default_factory=lambda: METHODS)
    controls: tuple[str, ...] = CONTROLS
    dirichlet: Mapping[str, Scalar] = field(default_factory=dict)
    ranks: Mapping[str, Scalar] = field(default_factory=dict)
    rank_methods: tuple[str, ...] = ("flexlora", "hetlora", "flora", "ffa", "rolora")


def methods_study(grid: MethodsGrid, do: RunTrials) -> Figures:
    """Do every trial of the study and return its figures: the tuning, and a table of rows per part."""
    names = [*grid.methods, *grid.controls]
    if len(grid.rates) > 1:
        tuning = do(
            [_trial(grid, DOMAIN, name, rate, grid.tuning_seed) for name in names for rate in grid.rates]
        )
        rates = chosen_rates(tuning)
    else:
        tuning, rates = [], dict.fromkeys(names, grid.rates[0])
    parts = {DOMAIN: [name for name in names if name in rates]}
    if grid.dirichlet:
        parts[DIRICHLET] = [name for name in parts[DOMAIN] if name != ONE_SHOT]
    if grid.ranks:
        parts[RANKS] = [name for name in grid.rank_methods if name in rates]
    trials = [
        _trial(grid, part, name, rates[name], seed)
        for part, included in parts.items()
        for name in included
        for seed in grid.seeds
    ]
    outcomes = do(trials)
    every = [*tuning, *outcomes]
    edges = (min(grid.rates), max(grid.rates))
    return {
        "rates": rates,
        "rate_at_edge": [name for name, rate in rates.items() if tuning and rate in edges],
        "tuning": tuning_table(tuning),
        "left_out": {
            str(o.trial.labels["method"]): o.reason for o in every if o.reason.startswith("refused")
        },
        "tokens": statistics.median([o.figures["tokens"] for o in every if o.is_done] or [0]),
        "tables": {part: table([o for o in outcomes if o.trial.labels["part"] == part]) for part in parts},
    }


def _trial(grid: MethodsGrid, part: str, name: str, rate: float, seed: int) -> Trial:
    keys: dict[str, Scalar] = {**grid.flat, "train.learning-rate": rate, "seed": seed}
    keys |= {DIRICHLET: grid.dirichlet, RANKS: grid.ranks}.get(part, {})
    options: dict[str, Scalar] = {}
    if name == ONE_SHOT:
        steps = int(keys["federation.num-rounds"]) * int(keys["train.local-steps"])
        keys |= {"federation.num-rounds": 1, "train.local-steps": steps, "aggregation.read-out": "svd"}
    elif name == LOCAL_ONLY and seed != grid.tuning_seed:
        options["everywhere"] = True
    labels: dict[str, Scalar] = {"part": part, "method": name, "rate": rate, "seed": seed}
    kind = _KINDS.get(name, "federation")
    return Trial("methods", kind, labels, {**keys, **grid.methods.get(name, {})}, options)


def chosen_rates(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return per method the rate of the least mean held-out loss; a method that never ended has none."""
    best: dict[str, tuple[float, float]] = {}
    for outcome in outcomes:
        loss = outcome.figures.get("mean_after", math.inf) if outcome.is_done else math.inf
        name, rate = str(outcome.trial.labels["method"]), float(outcome.trial.labels["rate"])
        if math.isfinite(loss):
            best[name] = min(best.get(name, (math.inf, 0.0)), (loss, rate))
    return {name: rate for name, (_, rate) in best.items()}


def tuning_table(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float | str]]:
    """Return the tuning seed's mean loss per method and learning rate, or why there is none."""
    found: dict[str, dict[str, float | str]] = {}
    for outcome in outcomes:
        row = found.setdefault(str(outcome.trial.labels["method"]), {})
        row[f"{outcome.trial.labels['rate']:g}"] = outcome.reason or outcome.figures["mean_after"]
    return found


def table(outcomes: Sequence[Outcome]) -> dict[str, Figures]:
    """Return one row per method over its seeds: mean and standard deviation of losses, and what it cost."""
    by_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(str(outcome.trial.labels["method"]), []).append(outcome)
    return {name: _row(group) for name, group in by_method.items()}


def _row(group: Sequence[Outcome]) -> Figures:
    done = [outcome.figures for outcome in group if outcome.is_done]
    reasons = sorted({outcome.reason for outcome in group if outcome.reason})
    row: Figures = {"seeds": len(done), "rate": group[0].trial.labels["rate"]}
    if reasons:
        row["reasons"] = reasons
    if not done:
        return row
    for name in ("mean_before", "mean_after", "worst_after", "spread_after", "union_after"):
        values = [figures[name] for figures in done if name in figures]
        if values:
            row[name] = mean_and_sd(values)
    for name in ("rho", "kept"):
        means = [mean_of(figures, name) for figures in done]
        if all(map(math.isfinite, means)):
            row[name] = statistics.fmean(means)
    for name in ("bytes_up", "bytes_down", "lost"):
        if name in done[0]:
            row[name] = statistics.fmean(figures[name] for figures in done)
    return row
