"""The study of the privacy experiment: which trials there are, and what is tuned on which seed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.config.key import Scalar
from scripts.experiments.privacy.tables import BY_HEART, CLIPPED, NONE, UNBUDGETED, base_of, rows_of
from scripts.studies.trials import Figures, RunTrials, Trial

Tuned = tuple[float, float]  # (learning rate, clip); clip 0 where nothing is clipped for privacy


@dataclass(frozen=True)
class Part:
    """One unit of privacy: `flat` holds the keys of all its runs, `private` those that privacy adds.

    `clipped` are the keys of a run that is clipped and not noised, None where there is none. Rates and clips
    are tuned on `tuning_seed` at `tuning_epsilon`; a single one of each is taken as it is. `audit_rows`
    bounds the rows that an attack looks at. With `epochs` above 0 the attack has its positive control.
    """

    name: str
    flat: Mapping[str, Scalar]
    private: Mapping[str, Scalar]
    presets: tuple[str, ...]
    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    private_rates: tuple[float, ...]
    clips: tuple[float, ...]
    clipped: Mapping[str, Scalar] | None = None
    tuning_epsilon: float = 3.0
    tuning_seed: int = 0
    audit_rows: int = 0
    epochs: int = 0


def study(part: Part, do: RunTrials) -> Figures:
    """Do every trial of a part and return its figures: what was tuned, and a row per preset and epsilon."""
    tuned, tuning = tune(part, do)
    wanted = [
        _trial(part, preset, epsilon, tuned[preset, epsilon not in UNBUDGETED], seed, audited=True)
        for preset, epsilon in _conditions(part)
        if (preset, epsilon not in UNBUDGETED) in tuned
        for seed in part.seeds
    ]
    outcomes = do(wanted)
    return {
        "tuned": {_tuned_name(*key): {"rate": rate, "clip": clip} for key, (rate, clip) in tuned.items()},
        "at_edge": _at_edge(part, tuned),
        "tuning": tuning,
        "base": base_of(outcomes),
        "rows": rows_of(outcomes),
        "reasons": sorted({outcome.reason for outcome in outcomes if outcome.reason}),
    }


def _conditions(part: Part) -> list[tuple[str, float]]:
    """Return the (preset, epsilon) that are reported, controls last."""
    epsilons = [*part.epsilons, *([CLIPPED] if part.clipped is not None else []), NONE]
    found = [(preset, epsilon) for preset in part.presets for epsilon in epsilons]
    return [*found, *([(part.presets[0], BY_HEART)] if part.epochs else [])]


def tune(part: Part, do: RunTrials) -> tuple[dict[tuple[str, bool], Tuned], list[Figures]]:
    """Return the rate and the clip of least mean held-out loss by (preset, is private), and what was tried.

    Looking at these runs is not charged: on text that is private indeed they would add to epsilon.
    """
    tried = {
        (preset, is_private): _choices(part, is_private)
        for preset in part.presets
        for is_private in (False, True)
    }
    if all(len(choices) == 1 for choices in tried.values()):
        return {key: choices[0] for key, choices in tried.items()}, []
    trials = [
        _trial(part, preset, part.tuning_epsilon if is_private else NONE, choice, part.tuning_seed)
        for (preset, is_private), choices in tried.items()
        for choice in choices
    ]
    best: dict[tuple[str, bool], tuple[float, Tuned]] = {}
    found: list[Figures] = []
    for outcome in do(trials):
        labels = outcome.trial.labels
        key = str(labels["preset"]), labels["epsilon"] != NONE
        choice = float(labels["rate"]), float(labels["clip"])
        loss = outcome.figures.get("mean_after", math.inf) if outcome.is_done else math.inf
        found.append({**labels, "mean_after": outcome.reason or loss})
        if math.isfinite(loss):
            best[key] = min(best.get(key, (math.inf, choice)), (loss, choice))
    return {key: choice for key, (_, choice) in best.items()}, found


def _choices(part: Part, is_private: bool) -> list[Tuned]:
    if not is_private:
        return [(rate, 0.0) for rate in part.rates]
    return [(rate, clip) for rate in part.private_rates for clip in part.clips]


def _at_edge(part: Part, tuned: Mapping[tuple[str, bool], Tuned]) -> list[str]:
    """Return what was tuned to the first or last of its choices: beyond it might be better."""
    found = []
    for (preset, is_private), (rate, clip) in tuned.items():
        rates = part.private_rates if is_private else part.rates
        name = _tuned_name(preset, is_private)
        if len(rates) > 1 and rate in (min(rates), max(rates)):
            found.append(f"{name}: rate {rate:g}")
        if is_private and len(part.clips) > 1 and clip in (min(part.clips), max(part.clips)):
            found.append(f"{name}: clip {clip:g}")
    return found


def _tuned_name(preset: str, is_private: bool) -> str:
    return f"{preset}, {'private' if is_private else 'not private'}"


def _trial(
    part: Part, preset: str, epsilon: float, tuned: Tuned, seed: int, *, audited: bool = False
) -> Trial:
    rate, clip = tuned
    keys: dict[str, Scalar] = {
        **part.flat,
        "aggregation.preset": preset,
        "train.learning-rate": rate,
        "seed": seed,
    }
    if epsilon not in UNBUDGETED:
        keys |= {**part.private, "privacy.epsilon": epsilon, "privacy.clip": clip}
    if epsilon == CLIPPED:
        keys |= part.clipped or {}
    labels: dict[str, Scalar] = {
        "part": part.name,
        "preset": preset,
        "epsilon": epsilon,
        "rate": rate,
        "clip": clip,
        "seed": seed,
    }
    if epsilon == BY_HEART:
        return Trial("privacy", "by heart", labels, keys, {"epochs": part.epochs})
    options: dict[str, Scalar] = {"audit_rows": part.audit_rows} if audited and part.audit_rows else {}
    return Trial("privacy", "private", labels, keys, options)
