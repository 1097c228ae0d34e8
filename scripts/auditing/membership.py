"""Which rows were trained on, and which can be got back whole, by what the adapter says of them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedllm.attacks.extraction import extractable, extraction, suffix_of
from fedllm.attacks.membership import SIGNALS, roc, separation
from fedllm.attacks.token_scores import TokenScores, no_adapter, score
from fedllm.engine.engine import Engine
from fedllm.models.chat import Encoded
from scripts.auditing.control import Control
from scripts.auditing.opening import Case

SHOWN = ("loss", "loss-ratio", "min-k++")
CURVE = "loss-ratio"  # the strongest cheap signal, so the one that is drawn

Pair = tuple[list[TokenScores], list[TokenScores]]  # of rows under an adapter and under the base model


@dataclass(frozen=True, eq=False)
class Scored:
    """Members and held-out rows of a run under its adapter, and the same of the positive control."""

    members: Pair
    others: Pair
    learnt: Pair
    unseen: Pair


def scored(case: Case, control: Control) -> Scored:
    """Return the token scores that every membership signal is made of."""
    return Scored(
        members=scored_rows(case.engine, case.adapter.vector, case.members),
        others=scored_rows(case.engine, case.adapter.vector, case.others),
        learnt=scored_rows(control.engine, control.vector, control.members),
        unseen=scored_rows(control.engine, control.vector, control.others),
    )


def scored_rows(engine: Engine, vector: torch.Tensor, rows: Sequence[Encoded]) -> Pair:
    """Return the token scores of rows under the adapter `vector` [P] and under the base model alone."""
    adapter, base = score(engine, [vector, no_adapter(engine)], rows)
    return adapter, base


def _signals(name: str, pair: Pair) -> list[float]:
    return [SIGNALS[name](adapter, base, "") for adapter, base in zip(*pair, strict=True)]


def membership_report(scores: Scored) -> dict[str, Any]:
    """Return for every signal how well it separates, with its controls.

    To what `separations` gives it adds `positive_control`, which must not be near 0.5.
    """
    return {
        name: {
            **found,
            "positive_control": asdict(
                separation(_signals(name, scores.learnt), _signals(name, scores.unseen))
            ),
        }
        for name, found in separations(scores.members, scores.others).items()
    }


def separations(members: Pair, others: Pair) -> dict[str, dict[str, Any]]:
    """Return for every signal how well it tells members from held-out rows, with two controls.

    `run` is members against held-out rows under the adapter; `held_out` one half of the held-out rows against
    the other, `base` the base model in place of the adapter: both should be near 0.5. A control that cannot
    be measured is null.
    """
    report: dict[str, dict[str, Any]] = {}
    for name in SHOWN:
        found, unseen = _signals(name, members), _signals(name, others)
        half = len(unseen) // 2
        report[name] = {
            "run": asdict(separation(found, unseen)),
            "held_out": asdict(separation(unseen[:half], unseen[half:])) if half else None,
            "base": _of_base(name, members, others),
        }
    return report


def null_deviation(num_members: int, num_others: int) -> float:
    """Return the standard deviation of the area where there is no signal (Mann and Whitney 1947)."""
    return math.sqrt((num_members + num_others + 1) / (12 * num_members * num_others))


def _of_base(name: str, members: Pair, others: Pair) -> dict[str, Any] | None:
    """Return how the base model alone separates; its ratio to itself says nothing."""
    if name == "loss-ratio":
        return None
    (_, found), (_, unseen) = members, others
    return asdict(separation(_signals(name, (found, found)), _signals(name, (unseen, unseen))))


def curves(scores: Scored) -> dict[str, list[tuple[float, float]]]:
    """Return the ROC curves of the signal that is drawn, for the run and for the positive control."""
    return {
        "run": roc(_signals(CURVE, scores.members), _signals(CURVE, scores.others)),
        "positive_control": roc(_signals(CURVE, scores.learnt), _signals(CURVE, scores.unseen)),
    }


def extraction_report(case: Case, control: Control, *, prefix: int, suffix: int) -> dict[str, Any]:
    """Return how many texts greedy decoding gives back, `suffix` tokens after the first `prefix`.

    `run` are members, `held_out` rows that were not trained on, `base` the members under the base model:
    common phrases are given back too. `positive_control` is the control on what it has learnt by heart.
    """

    def given_back(engine: Engine, vector: torch.Tensor, rows: Sequence[Encoded]) -> dict[str, Any]:
        texts = extractable(rows, prefix, suffix)
        (scores,) = score(engine, [vector], texts) if texts else ([],)
        found = extraction([suffix_of(one, prefix, suffix) for one in scores])
        return {**asdict(found), "rate": found.rate}

    adapter, nothing = case.adapter.vector, no_adapter(case.engine)
    return {
        "prefix": prefix,
        "suffix": suffix,
        "run": given_back(case.engine, adapter, case.members),
        "held_out": given_back(case.engine, adapter, case.others),
        "base": given_back(case.engine, nothing, case.members),
        "positive_control": given_back(control.engine, control.vector, control.members),
    }
