"""What a step is judged by: losses by domain, and whom the teacher listened to where.

Tensor suffixes: N predicted token, K teachers.
"""

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
    """A mean loss in nats per token, over all tokens and over those of each domain."""

    mean: float
    domains: Mapping[str, float]


def loss_of(engine: Engine, adapter: AdapterState, rows: Sequence[Encoded], domains: Sequence[str]) -> Loss:
    """Return the loss of an adapter on rows that each count in a domain."""
    jobs = [
        EvaluationJob(domain, adapter.vector, tuple(found))
        for domain, found in by_domain(domains, rows).items()
    ]
    measured = engine.evaluate(jobs)
    num_tokens = sum(each.num_tokens for each in measured)
    mean = sum(each.loss * each.num_tokens for each in measured) / num_tokens
    return Loss(mean, {each.client_id: each.loss for each in measured})


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
