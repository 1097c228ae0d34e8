"""What local training takes and gives: one job is one client in one round."""

from dataclasses import dataclass

import torch

from fedllm.models.chat import Encoded
from fedllm.types import LocalTraining


@dataclass(frozen=True, eq=False)
class Job:
    """One client's work: `batches[i]` are the rows of local step i, `start` [P] the adapter before it."""

    client_id: str
    start: torch.Tensor
    batches: tuple[tuple[Encoded, ...], ...]
    training: LocalTraining


@dataclass(frozen=True, eq=False)
class Result:
    """What training gave: `delta` [P] = after - before; `loss` is the mean over steps, in nats per token."""

    client_id: str
    delta: torch.Tensor
    loss: float
    num_rows: int
    num_tokens: int
    seconds: float
