"""Scores of texts under adapters, token by token: one pass for many adapters on one base model.

Everything that the attacks of `membership` and `extraction` need from a model is computed here, so that they
are pure functions.
Tensor suffixes: N learnt token of a text, V vocabulary, D feature, P adapter value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.engine.engine import Engine
from fedllm.engine.passes import MAX_ADAPTERS, Item, split
from fedllm.models.chat import Encoded


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One text under one model: numbers [N] for its learnt tokens, in nats as float64."""

    log_probs: torch.Tensor
    # Mean and standard deviation of log p(token) for a token drawn from the model's own prediction, which
    # Min-K%++ standardises by (arXiv 2404.02936).
    means: torch.Tensor
    deviations: torch.Tensor
    is_top: torch.Tensor  # whether greedy decoding would choose the token


def whole(tokens: Sequence[int]) -> Encoded:
    """Return tokens as a row that is learnt, and so scored, from its second token on."""
    return Encoded(tuple(tokens), tuple(tokens))


def no_adapter(engine: Engine) -> torch.Tensor:
    """Return the adapter [P] that changes nothing, for scores of the base model."""
    return torch.zeros(engine.layout.size)


@torch.inference_mode()
def score(
    engine: Engine, adapters: Sequence[torch.Tensor], rows: Sequence[Encoded]
) -> list[list[TokenScores]]:
    """Return the scores of every row under every adapter [P] of the engine's layout: [adapter][row].

    A row without a learnt token has empty scores. Passes are fused up to the engine's token budget, which
    changes speed and rounding, nothing else.
    """
    found: list[list[TokenScores]] = []
    for begin in range(0, len(adapters), MAX_ADAPTERS):
        held = adapters[begin : begin + MAX_ADAPTERS]
        engine.bank.load(engine.layout, held, [engine.layout.scale] * len(held))
        items = [Item(row, place, 0, 1.0) for place in range(len(held)) for row in rows]
        done: list[TokenScores] = []
        with engine.passes.attached():
            for part in split(items, engine.limits.together):
                done += _scored(engine, part)
        found += [done[len(rows) * place : len(rows) * (place + 1)] for place in range(len(held))]
    return found


def _scored(engine: Engine, items: Sequence[Item]) -> list[TokenScores]:
    """Return the scores of the samples of one pass, in order."""
    chunks = [_chunk_scores(*chunk) for chunk in engine.passes.learnt_logits(items)]
    sizes = [item.row.num_supervised for item in items]
    columns = [torch.split(torch.cat(column).cpu(), sizes) for column in zip(*chunks, strict=True)]
    return [TokenScores(*values) for values in zip(*columns, strict=True)]


def _chunk_scores(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the four columns of `TokenScores`."""
    log_NV = logits_NV.log_softmax(dim=1)
    probs_NV = log_NV.exp()
    means_N = (probs_NV * log_NV).sum(dim=1)
    deviations_N = (probs_NV * (log_NV - means_N[:, None]).square()).sum(dim=1).sqrt()
    chosen_N = log_NV.gather(1, targets_N[:, None])[:, 0]
    numbers = (chosen_N, means_N, deviations_N)
    return (*(column.double() for column in numbers), log_NV.argmax(dim=1) == targets_N)
