"""What the engine takes and gives: jobs and their results. A training job is one client in one round."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.head import Criterion
from fedllm.finite import all_finite
from fedllm.messages import LocalTraining
from fedllm.models.chat import Encoded
from fedllm.seeds import derive_seed


class Objective(Protocol):
    """What training asks of a row's tokens, where it is not the next token alone."""

    def criterion(self, rows: Sequence[Encoded], device: torch.device) -> Criterion:
        """Return the criterion for all supervised tokens of `rows`, in order."""


@dataclass(frozen=True)
class StepNoise:
    """Gaussian noise on the mean gradient of every step, of `deviation`.

    It is drawn from the secret `key`, the step and the very gradient that it hides.
    """

    key: bytes
    deviation: float


@dataclass(frozen=True, eq=False)
class Job:
    """One client's work: `batches[i]` are the rows of local step i, `start` [P] the adapter before it.

    `layout` is given where the client's rank differs from the engine's. `trained` is "both" factors, or "a"
    or "b" alone (fedllm.adapters.parts): the other keeps its bits, and the delta has zeros there. With
    `example_clip` above 0 every row's own gradient is clipped to that norm before the rows are averaged, and
    `noise`, if any, is added to their mean (DP-SGD, arXiv 1607.00133). The mean is the sum divided by
    `training.batch_size`, the expected number of rows: a batch drawn by coins has more or fewer, or none.
    `example_clip` 0 takes the gradient of the batch's mean token loss.
    `seed` is where LoRA dropout draws from, row by row (`row_seed`). FedProx pulls to `anchor` [P], or to
    `start` where none is given. `movable` [P] says which values may move, if not all. SCAFFOLD's `correction`
    [P] is added to every gradient (`fedllm.engine.gradient_terms`). `objective` replaces the cross-entropy
    with the next token (`fedllm.distillation`). After each number of steps in `snapshots` the delta so far is
    kept as well: one training gives the adapters of several lengths.
    """

    client_id: str
    start: torch.Tensor
    batches: tuple[tuple[Encoded, ...], ...]
    training: LocalTraining
    trained: str = "both"
    layout: AdapterLayout | None = None
    example_clip: float = 0.0
    seed: int = 0
    anchor: torch.Tensor | None = None
    movable: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    objective: Objective | None = None
    noise: StepNoise | None = None
    snapshots: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of all its rows."""
        return sum(len(row.tokens) for batch in self.batches for row in batch)


def row_seed(job: Job, step: int, row: int) -> int:
    """Return the seed of LoRA dropout for a row of a step: its own, whoever it shares a pass with."""
    return derive_seed(job.seed, "dropout", step, row)


@dataclass(frozen=True, eq=False)
class Result:
    """What training gave: `delta` [P] = after - before; `loss` is the mean of the steps' `losses`.

    Losses are in nats per learnt token. Where the job had a correction, `gradient` [P] is the mean over steps
    of the gradient without it, each clipped to the job's clip norm. `snapshots` holds the delta after as many
    steps as the job asked for.
    """

    client_id: str
    delta: torch.Tensor
    loss: float
    num_rows: int
    num_tokens: int
    seconds: float  # its share, by tokens, of the pass it was trained in
    gradient: torch.Tensor | None = None
    losses: tuple[float, ...] = ()
    snapshots: Mapping[int, torch.Tensor] = field(default_factory=dict)


def is_finite(result: Result) -> bool:
    """Return whether training gave numbers; where it diverged, NaN or infinity."""
    vectors = (result.delta, *(() if result.gradient is None else (result.gradient,)))
    return math.isfinite(result.loss) and all_finite(*vectors)


@dataclass(frozen=True, eq=False)
class EvaluationJob:
    """Rows to measure the loss of under the adapter `vector` [P]; `layout` where it is not the engine's."""

    client_id: str
    vector: torch.Tensor
    rows: tuple[Encoded, ...]
    layout: AdapterLayout | None = None
