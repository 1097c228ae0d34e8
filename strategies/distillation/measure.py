"""What a step is judged by: losses by domain, and whom the teacher listened to where.

Tensor suffixes: N predicted token, K teachers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterState
from fedllm.models.chat import Encoded
from fedllm.training.engine import Engine
from fedllm.training.jobs import EvaluationJob
from strategies.distillation.text import by_domain


@dataclass(frozen=True)
class Loss:
    """A mean loss in nats per token, over all tokens and over those of each domain.

    `texts` are the sum of the losses and the number of tokens of every text, in order.
    """

    mean: float
    domains: Mapping[str, float]
    texts: tuple[tuple[float, int], ...] = ()


def loss_of(engine: Engine, adapter: AdapterState, rows: Sequence[Encoded], domains: Sequence[str]) -> Loss:
    """Return the loss of an adapter on rows that each count in a domain."""
    jobs = [EvaluationJob(domain, adapter.vector, (row,)) for domain, row in zip(domains, rows, strict=True)]
    texts = tuple((each.loss * each.num_tokens, each.num_tokens) for each in engine.evaluate(jobs))
    means = {name: _mean(found) for name, found in by_domain(domains, texts).items()}
    return Loss(_mean(texts), means, texts)


def _mean(texts: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in texts) / sum(number for _, number in texts)


def error_of_gain(before: Loss, after: Loss) -> float:
    """Return the standard error of the change of a mean loss over the same texts, in nats per token.

    That of a ratio of sums over texts (Cochran 1977, section 2.11). One text alone has none: 0.
    """
    number = len(before.texts)
    if number < 2:
        return 0.0
    pairs = zip(before.texts, after.texts, strict=True)
    changes = [(new - old, num_tokens) for (old, num_tokens), (new, _) in pairs]
    mean = _mean(changes)
    rest = sum((change - mean * num_tokens) ** 2 for change, num_tokens in changes)
    return math.sqrt(rest * number / (number - 1)) / sum(num_tokens for _, num_tokens in changes)


def weights_by_domain(
    weights_NK: torch.Tensor,
    clients: Sequence[str],
    rows: Sequence[Encoded],
    domains: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Return the mean weight of every teacher over the predicted tokens of each domain's rows."""
    by_row = torch.split(weights_NK.double(), [row.num_supervised for row in rows])
    return {
        domain: dict(zip(clients, torch.cat(found).mean(dim=0).tolist(), strict=True))
        for domain, found in by_domain(domains, by_row).items()
    }
