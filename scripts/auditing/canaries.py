"""Canaries that a run planted: how much is learnt of them, and the epsilon that this alone refutes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.attacks.canaries import Canary
from fedllm.attacks.extraction import exposures
from fedllm.attacks.membership import likelihood
from fedllm.attacks.one_run import epsilon_lower_bound, guess_canaries
from fedllm.attacks.token_scores import no_adapter, score, whole
from fedllm.engine.engine import Engine
from scripts.auditing.control import Control
from scripts.auditing.opening import Case

SHARE = 0.5  # of the coins that are guessed, fixed before anything is seen
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Claim:
    """What privacy.json says of one coin of one canary: (epsilon, delta)."""

    epsilon: float
    delta: float


def claim_of(statement: Mapping[str, Any], repeats: int) -> Claim | None:
    """Return what a privacy statement claims of one coin, None where it claims nothing.

    A coin puts one row into a client's, or not. Where rows are the unit that is what neighbours differ in, if
    the canary stands there once; copies are further units. Where clients are the unit a coin replaces all
    that a client sends, which is one step under replace-one and two under add-or-remove: then epsilon counts
    twice, and delta 1 + e^epsilon times (group privacy).
    """
    if not statement:
        return None
    epsilon, delta = float(statement["epsilon"]), float(statement["delta"])
    if statement["unit"] == "example":
        return Claim(epsilon, delta) if repeats == 1 else None
    if statement["trust"] == "local":
        return Claim(epsilon, delta)
    doubled = delta * (1 + math.exp(min(700.0, epsilon)))
    return Claim(2 * epsilon, doubled) if doubled < 1 else None


def canary_report(case: Case, control: Control) -> dict[str, Any]:
    """Return exposure and lower bound by how often a canary was repeated, with their controls.

    `base` is the base model, which has seen no canary; `positive_control` has learnt those of one client by
    heart, each once. `claimed` is what the run's privacy statement says of one coin.
    """
    if not case.canaries:
        return {"skipped": "the run planted none: fedllm run audit.canaries=100 does"}
    losses, base_losses = _losses(case.engine, case.adapter.vector, case.canaries)
    groups: dict[str, Any] = {}
    for repeats in sorted({one.repeats for one in case.canaries}):
        places = [place for place, one in enumerate(case.canaries) if one.repeats == repeats]
        canaries = [case.canaries[place] for place in places]
        after, before = ([values[place] for place in places] for values in (losses, base_losses))
        claim = claim_of(case.statement, repeats)
        delta = claim.delta if claim is not None else 0.0
        groups[str(repeats)] = {
            "claimed": {"epsilon": claim.epsilon, "delta": claim.delta} if claim is not None else None,
            "run": _measured(canaries, after, before, delta),
            "base": _measured(canaries, before, [0.0] * len(before), delta),
        }
    return {
        "share_guessed": SHARE,
        "confidence": CONFIDENCE,
        "repeats": groups,
        "positive_control": _of_control(control),
    }


def _losses(
    engine: Engine, vector: torch.Tensor, canaries: Sequence[Canary]
) -> tuple[list[float], list[float]]:
    """Return the loss of every canary under an adapter [P], and under the base model."""
    adapter, base = score(engine, [vector, no_adapter(engine)], [whole(one.tokens) for one in canaries])
    return [-likelihood(one) for one in adapter], [-likelihood(one) for one in base]


def _measured(
    canaries: Sequence[Canary], losses: Sequence[float], base_losses: Sequence[float], delta: float
) -> dict[str, Any]:
    guesses = guess_canaries(canaries, losses, base_losses, SHARE)
    found = [value for values in exposures(canaries, losses).values() for value in values]
    num_out = sum(not one.included for one in canaries)
    return {
        "num_canaries": len(canaries),
        "num_included": len(canaries) - num_out,
        "num_guessed": guesses.num_guessed,
        "num_right": guesses.num_right,
        "mean_exposure": sum(found) / len(found) if found else None,
        "largest_exposure": math.log2(num_out + 1),
        "epsilon_lower_bound": epsilon_lower_bound(guesses, delta=delta, confidence=CONFIDENCE),
    }


def _of_control(control: Control) -> dict[str, Any] | None:
    if not control.canaries:
        return None
    losses, base_losses = _losses(control.engine, control.vector, control.canaries)
    return _measured(control.canaries, losses, base_losses, 0.0)
