"""Study C: what one or two malicious clients of ten do to the others, and what robust rules save.

A `ratio` is the honest clients' mean held-out loss after the run over that of the same clients after the
clean run with no rule; `gain` is their improvement over the base model as a share of that of the clean run.
Clients count alike, so one of ten holds a tenth of the weight.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.config.key import Scalar
from scripts.experiments.aggregation.poisoned_rows import BACKDOOR, LABELS
from scripts.reports import Goal
from scripts.studies.trials import Figures, Outcome, RunTrials, Trial

ROBUST_KEY = "aggregation.robust"
NO_RULE = "none"
RULES: dict[str, Mapping[str, Scalar]] = {
    NO_RULE: {},
    **{name: {ROBUST_KEY: name} for name in ("norm-clip", "multi-krum", "geometric-median", "similarity")},
}
CLEAN = "clean"
# What is done to the changes, and whether the server's bound on honest moves is in force.
HUGE_FLIP = "huge flip"
UNGUARDED = "huge flip, no bound"
ATTACKS: dict[str, Mapping[str, Scalar]] = {
    HUGE_FLIP: {"updates": "huge flip"},
    UNGUARDED: {"updates": "huge flip", "validated": False},
    "flip within bound": {"updates": "flip within bound"},
    "flip at bound": {"updates": "flip at bound"},
    "noise within bound": {"updates": "noise within bound"},
    "labels": {"rows": LABELS},
}
JUDGED = (HUGE_FLIP, UNGUARDED, "flip within bound", "flip at bound")
GOAL = 0.98  # a robust run within 2 % of the clean loss


@dataclass(frozen=True)
class PoisonGrid:
    """What study C does: `flat` holds the keys of all its runs, `rules` those of each, the first none."""

    flat: Mapping[str, Scalar]
    skews: tuple[str, ...]
    attacks: Mapping[str, tuple[int, ...]]  # name -> numbers of malicious clients
    rules: Mapping[str, Mapping[str, Scalar]]
    seed: int
    # what is done to the changes besides -> numbers of malicious clients
    backdoors: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"": (1, 2), "boost within bound": (2,)}
    )
    share: float = 0.5  # of a malicious client's rows
    trigger: str = "cf mn tq"
    target: str = "zv"  # what no model says of itself
    probes: int = 48


def poison_study(grid: PoisonGrid, do: RunTrials) -> Figures:
    """Do every run of the study and return its figures: a table per skew, and one of backdoors."""
    tables: Figures = {}
    backdoors: Figures = {}
    tokens: list[float] = []
    for skew in grid.skews:
        clean = do([_trial(grid, skew, rule, CLEAN, 0, {}) for rule in grid.rules])
        trials = [
            _trial(grid, skew, rule, attack, number, ATTACKS[attack])
            for attack, numbers in grid.attacks.items()
            for number in numbers
            for rule in grid.rules
        ]
        outcomes = do(trials)
        planted = do(_backdoor_trials(grid, skew))
        tables[skew] = table(clean[0], [*clean, *outcomes])
        backdoors[skew] = table(clean[0], planted)
        tokens += [outcome.figures["tokens"] for outcome in clean if outcome.is_done]
    return {
        "tables": tables,
        "backdoors": backdoors,
        "tokens": statistics.median(tokens) if tokens else 0,
        "worst": worst(tables),
        "worst_bounded": worst(tables, (HUGE_FLIP,)),
    }


def _backdoor_trials(grid: PoisonGrid, skew: str) -> list[Trial]:
    planted: dict[str, Scalar] = {
        "rows": BACKDOOR,
        "share": grid.share,
        "trigger": grid.trigger,
        "target": grid.target,
        "probes": grid.probes,
    }
    trials = [_trial(grid, skew, NO_RULE, CLEAN, 0, planted)] if grid.backdoors else []
    for changed, numbers in grid.backdoors.items():
        name = f"backdoor, {changed}" if changed else "backdoor"
        for number in numbers:
            for rule in grid.rules:
                options = {**planted, "updates": changed}
                trials.append(_trial(grid, skew, rule, name, number, options))
    return trials


def _trial(
    grid: PoisonGrid,
    skew: str,
    rule: str,
    attack: str,
    malicious: int,
    options: Mapping[str, Scalar],
) -> Trial:
    labels: dict[str, Scalar] = {"skew": skew, "attack": attack, "malicious": malicious, "rule": rule}
    keys = {**grid.flat, "data.partition": skew, "seed": grid.seed, **grid.rules[rule]}
    return Trial("poison", "attacked", labels, keys, {**options, "malicious": malicious})


def table(clean: Outcome, outcomes: Sequence[Outcome]) -> dict[str, dict[str, Figures]]:
    """Return attack -> rule -> what it did; attacks are named with their number of malicious clients."""
    found: dict[str, dict[str, Figures]] = {}
    for outcome in outcomes:
        labels = outcome.trial.labels
        name = f"{labels['attack']} x{labels['malicious']}" if labels["malicious"] else str(labels["attack"])
        found.setdefault(name, {})[str(labels["rule"])] = _entry(clean, outcome)
    return found


def _entry(clean: Outcome, outcome: Outcome) -> Figures:
    if not outcome.is_done:
        return {"reason": outcome.reason}
    figures = outcome.figures
    entry: Figures = {"lost": figures["lost"], "reasons": figures["lost_reasons"]}
    if clean.is_done:
        attacked, best, base = honest_losses(figures, clean.figures)
        entry["ratio"] = attacked / best
        entry["gain"] = (base - attacked) / (base - best) if base != best else 0.0
    if "backdoor" in figures:
        entry["backdoor"] = figures["backdoor"]
    return entry


def honest_losses(attacked: Figures, clean: Figures) -> tuple[float, float, float]:
    """Return the honest clients' mean loss after the attacked run, after the clean one and before either."""
    honest = [name for name in attacked["after"] if name not in attacked["attackers"]]
    runs = (attacked["after"], clean["after"], clean["before"])
    after, best, base = (sum(run[name] for name in honest) / len(honest) for run in runs)
    return after, best, base


def worst(
    tables: Mapping[str, Mapping[str, Mapping[str, Figures]]], judged: Sequence[str] = JUDGED
) -> dict[str, float]:
    """Return per rule the smallest clean loss over attacked loss of the attacks judged; 0 where a run failed.

    Rules that the configuration refused are left out.
    """
    found: dict[str, float] = {}
    for by_attack in tables.values():
        for name, by_rule in by_attack.items():
            if name.rpartition(" x")[0] not in judged:
                continue
            for rule, entry in by_rule.items():
                if entry.get("reason", "").startswith("refused"):
                    continue
                value = 1 / entry["ratio"] if "ratio" in entry else 0.0
                found[rule] = min(found.get(rule, value), value)
    return found


def goals(figures: Figures) -> dict[str, Goal]:
    """Return two goals per rule: in the worst case judged, the clean loss is 98 % of the attacked one.

    One is over all attacks judged, with those that know the server's bound on updates or meet none; the other
    over updates scaled by a million and flipped, as a run meets them.
    """
    named = {"clean_over_attacked": figures["worst"], "clean_over_huge_flip": figures["worst_bounded"]}
    return {
        f"{name}_{rule}": Goal(value, GOAL)
        for name, by_rule in named.items()
        for rule, value in by_rule.items()
        if rule != NO_RULE
    }
