"""One forward pass over samples of many adapters, with or without a backward pass, and how work is split.

Tensor suffixes: B sample, N supervised token, D feature.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch

from fedllm.engine.adapter_bank import Bank, Route, noisy_rows, segments
from fedllm.engine.flat_row import FlatRow, lay_out, predicting_states, token_losses
from fedllm.engine.head import Head
from fedllm.engine.jobs import EvaluationJob, Objective
from fedllm.models.base import BaseModel
from fedllm.models.chat import Encoded

MAX_ADAPTERS = 64  # held at once where nothing is trained

T = TypeVar("T")


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
    head: Head  # what turns the states into logits

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
        criterion = None
        if objective is not None:
            criterion = objective.criterion([item.row for item in items], self.base.device)
        weight_N = weight_B[flat.rows_N]
        loss, losses_N = token_losses(self.base.model, flat, self.head, weight_N, criterion)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
        # In float64 on the CPU: sums of many float32 losses, in an order that no GPU chooses.
        sums_B = torch.zeros(len(items), dtype=torch.float64)
        return sums_B.index_add_(0, flat.rows_N.cpu(), losses_N.detach().double().cpu())

    def states(self, items: Sequence[Item]) -> torch.Tensor:
        """Return what `predicting_states` does for all supervised tokens, sample by sample, [N, D]."""
        flat = self._lay_out(items, backward=False)
        return predicting_states(self.base.model, flat, self.head)

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


def packed(items: Sequence[T], sizes: Sequence[int], limit: int) -> Iterator[list[T]]:
    """Split items into runs of neighbours; their sizes add up to `limit` at most, or a run has one item."""
    run: list[T] = []
    filled = 0
    for item, size in zip(items, sizes, strict=True):
        if run and filled + size > limit:
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
