"""Held-out losses of adapters, over all texts and by domain, and how much of a change may be chance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fedllm.adapters.layout import AdapterState
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.models.chat import Encoded
from fedllm.runs.records import LossChange

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Loss:
    """A mean loss in nats per token, over all tokens and over those of each domain.

    `texts` has for every text, in order, the sum of its tokens' losses and their number.
    """

    mean: float
    domains: Mapping[str, float]
    texts: tuple[tuple[float, int], ...] = ()


def measure_loss(
    engine: Engine, adapter: AdapterState, rows: Sequence[Encoded], domains: Sequence[str] | None = None
) -> Loss:
    """Return the loss of an adapter on rows; `domains` has the domain of each, by default all in one."""
    domains = domains or [""] * len(rows)
    # One job a text: the standard error of a gain needs every text's own loss.
    jobs = [EvaluationJob(domain, adapter.vector, (row,)) for domain, row in zip(domains, rows, strict=True)]
    texts = tuple((each.loss * each.num_tokens, each.num_tokens) for each in engine.evaluate(jobs))
    means = {name: _mean(found) for name, found in group_by_domain(domains, texts).items()}
    return Loss(_mean(texts), means, texts)


def measure_base(engine: Engine, rows: Sequence[Encoded]) -> float:
    """Return the mean loss of the engine's base model, without any adapter."""
    return measure_loss(engine, AdapterState(engine.layout, torch.zeros(engine.layout.size)), rows).mean


def measure_change(
    engine: Engine, before: AdapterState, after: AdapterState, rows: Sequence[Encoded]
) -> LossChange | None:
    """Return the mean losses of two adapters on the same rows; None where there are no rows."""
    if not rows:
        return None
    return LossChange(*(measure_loss(engine, adapter, rows).mean for adapter in (before, after)))


def _mean(texts: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in texts) / sum(number for _, number in texts)


def error_of_gain(before: Loss, after: Loss) -> float:
    """Return the standard error, in nats per token, of the change of a mean loss over the same texts.

    The texts are the sample, not the tokens, since tokens of one text are alike. Mean losses are ratios of
    sums over texts, so it is the error of a ratio (Cochran 1977, section 2.11). One text alone has none: 0.
    """
    number = len(before.texts)
    if number < 2:
        return 0.0
    pairs = zip(before.texts, after.texts, strict=True)
    changes = [(new - old, num_tokens) for (old, num_tokens), (new, _) in pairs]
    mean = _mean(changes)
    # Residuals of change ~ mean x length, the linearised error of a ratio.
    rest = sum((change - mean * num_tokens) ** 2 for change, num_tokens in changes)
    return math.sqrt(rest * number / (number - 1)) / sum(num_tokens for _, num_tokens in changes)


def group_by_domain(domains: Sequence[str], values: Sequence[_Value]) -> Mapping[str, list[_Value]]:
    """Return the values of each domain in their order; domains in order of their names."""
    grouped: dict[str, list[_Value]] = {domain: [] for domain in sorted(set(domains))}
    for domain, value in zip(domains, values, strict=True):
        grouped[domain].append(value)
    return grouped
