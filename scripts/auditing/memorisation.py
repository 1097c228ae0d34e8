"""What an adapter nearly repeats of its training text, and the figures of an audit that others may read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fedllm.adapters.layout import AdapterState
from fedllm.attacks.binomial import clopper_pearson
from fedllm.attacks.extraction import Extraction, extractable
from fedllm.attacks.token_scores import no_adapter
from fedllm.engine.engine import Engine
from fedllm.models.chat import Encoded
from fedllm.originality.duplicates import JACCARD, jaccard, shingles
from scripts.auditing.control import Control
from scripts.auditing.opening import Case

MOST_TEXTS = 64  # that are written on, of each kind: unlike a pass over the true text, decoding takes long
CONFIDENCE = 0.95
HEADING = "## Memorisation"
_KINDS = {"run": "", "held_out": "_held_out", "base": "_base"}
_WORDS = {
    "extraction": "texts given back token for token",
    "near_duplicates": "texts nearly repeated",
    "canary_exposure": "exposure of canaries, bits",
}


def near_duplicates_report(case: Case, control: Control, *, prefix: int, suffix: int) -> dict[str, Any]:
    """Return how many texts greedy decoding nearly repeats, `suffix` tokens after the first `prefix`.

    Exact repetition misses what differs in a word (Ippolito et al., arXiv 2210.17546). The kinds are those of
    `extraction_report`.
    """

    def repeated(engine: Engine, vector_P: torch.Tensor, rows: Sequence[Encoded]) -> dict[str, Any]:
        texts = [row.tokens for row in extractable(rows, prefix, suffix)[:MOST_TEXTS]]
        written = _written(engine, vector_P, [text[:prefix] for text in texts], suffix)
        near = sum(
            jaccard(shingles(own), shingles(text[prefix:])) >= JACCARD
            for own, text in zip(written, texts, strict=True)
        )
        low, high = clopper_pearson(near, len(texts), CONFIDENCE)
        found = Extraction(len(texts), near, low, high)
        return {**asdict(found), "rate": found.rate}

    adapter, nothing = case.adapter.vector, no_adapter(case.engine)
    return {
        "run": repeated(case.engine, adapter, case.members),
        "held_out": repeated(case.engine, adapter, case.others),
        "base": repeated(case.engine, nothing, case.members),
        "positive_control": repeated(control.engine, control.vector, control.members),
    }


def _written(
    engine: Engine, vector_P: torch.Tensor, beginnings: Sequence[Sequence[int]], most: int
) -> list[list[int]]:
    """Return the tokens that an adapter writes greedily after each beginning, `most` at most."""
    written: list[list[int]] = [[] for _ in beginnings]
    if beginnings:
        states = [AdapterState(engine.layout, vector_P)] * len(beginnings)
        for step in engine.stream(states, beginnings, most, lambda logits_BV: logits_BV.argmax(dim=-1)):
            for place, token in step.items():
                written[place].append(token)
    return written


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Return what an audit has measured of the figures that are kept (`fedllm.runs.memorisation`)."""
    figures = {}
    for name in ("extraction", "near_duplicates"):
        for kind, ending in _KINDS.items():
            if report[name][kind]["number"]:
                figures[name + ending] = float(report[name][kind]["rate"])
    groups = report["canaries"].get("repeats", {}).values()
    measured = [group for group in groups if group["run"]["mean_exposure"] is not None]
    if measured:  # of canaries that stood there more or less often those that are known best
        worst = max(measured, key=lambda group: float(group["run"]["mean_exposure"]))
        for kind in ("run", "base"):
            figures[f"canary_exposure{_KINDS[kind]}"] = float(worst[kind]["mean_exposure"])
    return figures


def with_memorisation(card: str, figures: Mapping[str, float]) -> str:
    """Return an adapter's card with the figures as its last section, in place of those it may have."""
    if not figures:
        return card
    rows = [
        f"| {words} | {' | '.join(_cell(figures.get(name + ending)) for ending in _KINDS.values())} |\n"
        for name, words in _WORDS.items()
        if name in figures
    ]
    rest = card.partition(f"\n{HEADING}")[0]
    return (
        f"{rest}\n{HEADING}\n\n"
        "What this adapter repeats of its training text (`fedllm audit`). Any model repeats common words.\n\n"
        f"| | rows trained on | rows held out | base model alone |\n|---|---|---|---|\n{''.join(rows)}"
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
