"""One forward pass over samples of many adapters, with or without a backward pass, and how work is split.

Tensor suffixes: B sample, N supervised token, D feature.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from sys import maxsize
from typing import TypeVar

import torch

from fedllm.engine.adapter_bank import Bank, Route, noisy_rows, segments
from fedllm.engine.flat_row import FlatRow, lay_out
from fedllm.engine.head import Criterion, CrossEntropy, Head, head_loss
from fedllm.engine.jobs import EvaluationJob, Objective
from fedllm.engine.layers import attached
from fedllm.models.base import BaseModel
from fedllm.models.chat import Encoded

MAX_ADAPTERS = 64  # held at once where nothing is trained

T = TypeVar("T")

# The model below its head: a flat row -> what it has computed where each learnt token is predicted [N, D].
Trunk = Callable[[FlatRow], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Item:
    """One sample of a pass: its row in the bank's parameters and gradients, and each token's weight."""

    row: Encoded
    client: int
    slot: int
    weight: float
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Passes:
    """Runs passes of a base model that has the adapters of a bank attached."""

    base: BaseModel
    bank: Bank
    trunk: Trunk
    head: Head  # what turns the states into logits
    is_ragged: bool  # whether samples may share a pass

    def attached(self) -> AbstractContextManager[None]:
        """Within the block the model has the bank's adapters, and attends within each sample."""
        return attached(self.base.model, self.bank, is_ragged=self.is_ragged)

    def losses(
        self, items: Sequence[Item], *, backward: bool, objective: Objective | None = None
    ) -> torch.Tensor:
        """Return every sample's summed token loss [B]; with `backward` add gradients to the bank too.

        The loss is the objective's, cross-entropy with the next token where there is none.
        """
        flat = self._lay_out(items, backward=backward)
        weight_B = torch.tensor(
            [item.weight for item in items], device=self.base.device, dtype=self.bank.dtype
        )
        criterion: Criterion = CrossEntropy(flat.targets_N)
        if objective is not None:
            criterion = objective.criterion([item.row for item in items], self.base.device)
        weight_N = weight_B[flat.rows_N]
        loss, losses_N = head_loss(self.trunk(flat), self.head, criterion, weight_N)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
        # In float64 on the CPU: sums of many float32 losses, in an order that no GPU chooses.
        sums_B = torch.zeros(len(items), dtype=torch.float64)
        return sums_B.index_add_(0, flat.rows_N.cpu(), losses_N.detach().double().cpu())

    def states(self, items: Sequence[Item]) -> torch.Tensor:
        """Return the trunk's states for all supervised tokens, sample by sample, [N, D]."""
        return self.trunk(self._lay_out(items, backward=False))

    def _lay_out(self, items: Sequence[Item], *, backward: bool) -> FlatRow:
        """Return the samples as one flat row, and tell the bank which rows its tokens belong to."""
        # What rows share must have one adapter, one gradient where those are wanted, and no noise of its own.
        owners = [(item.client, item.slot if backward else 0, item.seed) for item in items]
        flat = lay_out([item.row for item in items], self.base.device, owners)
        clients, slots, _ = zip(*(owner for owner, _ in groupby(owners)), strict=True)
        lengths = [len(item.row.tokens) for item in items]
        noise = noisy_rows(lengths, [item.dropout for item in items], [item.seed for item in items])
        self.bank.route = Route(segments(flat.lengths, clients), segments(flat.lengths, slots), noise)
        return flat


def split(items: Sequence[Item], limit: int, most: int = maxsize) -> Iterator[list[Item]]:
    """Split samples into forward passes of at most `limit` tokens and `most` samples."""
    return packed(items, [len(item.row.tokens) for item in items], limit, most)


def packed(items: Sequence[T], sizes: Sequence[int], limit: int, most: int = maxsize) -> Iterator[list[T]]:
    """Split items into runs of `most` neighbours whose sizes add up to `limit` at most, or of one item."""
    run: list[T] = []
    filled = 0
    for item, size in zip(items, sizes, strict=True):
        if run and (filled + size > limit or len(run) == most):
            yield run
            run, filled = [], 0
        run.append(item)
        filled += size
    if run:
        yield run


def by_adapters(jobs: Sequence[EvaluationJob]) -> Iterator[list[EvaluationJob]]:
    """Split jobs into neighbours that bring at most MAX_ADAPTERS different adapters."""
    group: list[EvaluationJob] = []
    seen: set[int] = set()
    for job in jobs:
        if id(job.vector) not in seen and len(seen) == MAX_ADAPTERS:
            yield group
            group, seen = [], set()
        group.append(job)
        seen.add(id(job.vector))
    if group:
        yield group
