"""One forward pass over samples of many adapters, with or without a backward pass, and how work is split.

Suffixes: B sample, N supervised token, D feature, G run of neighbours of one client, slot and dropout seed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from sys import maxsize
from typing import TypeVar

import numpy as np
import torch

from fedllm.engine.adapter_bank import Bank
from fedllm.engine.dropout import drop_arrays, noisy_rows
from fedllm.engine.flat_row import FlatRow, arrange
from fedllm.engine.graphs import Shelf, rounded_up
from fedllm.engine.head import CHUNK, GPU_CHUNK, Criterion, CrossEntropy, Head, head_loss
from fedllm.engine.jobs import EvaluationJob, Objective
from fedllm.engine.layers import attached
from fedllm.engine.pass_inputs import PassArrays, PassInputs, padded, place
from fedllm.engine.recorded_inputs import RecordedInputs, can_be_refilled, kind_of, recorded_inputs
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
    shelf: Shelf[RecordedInputs] | None = None  # of recorded passes, where a device can record any

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the model has the bank's adapters, and attends within each sample."""
        with attached(self.base.model, self.bank, is_ragged=self.is_ragged):
            if self.shelf is not None:
                # A recording knows weights by their addresses, and a base delta, say, moves them.
                weights = self.base.model.parameters()
                self.shelf.surroundings = tuple(weight.data_ptr() for weight in weights)
            yield

    def losses(
        self, items: Sequence[Item], *, backward: bool, objective: Objective | None = None
    ) -> torch.Tensor:
        """Return every sample's summed token loss [B] in float64; with `backward` add gradients to the bank.

        The loss is the objective's, cross-entropy with the next token where there is none. It is on the
        model's device, which need not have finished the pass.
        """
        arrays, criterion = self.arrange(items, backward=backward), None
        if objective is not None:
            criterion = objective.criterion([item.row for item in items], self.base.device)
        draws_by_row = bool(arrays.noise) and self.base.device.type == "cpu"  # other rows in every pass
        if self.shelf and self.is_ragged and not draws_by_row and can_be_refilled(criterion):
            return self._recorded(self.shelf, arrays, criterion, backward=backward)[: len(items)]
        inputs = place(arrays, self.base.device)
        return self.run(inputs, criterion or CrossEntropy(inputs.flat.targets_N), backward=backward)

    def states(self, items: Sequence[Item]) -> torch.Tensor:
        """Return the trunk's states for all supervised tokens, sample by sample, [N, D]."""
        inputs = place(self.arrange(items, backward=False), self.base.device)
        self.bank.route = inputs.route
        return self.trunk(inputs.flat)

    def learnt_logits(self, items: Sequence[Item]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits [n, V] and targets [n] of all supervised tokens, in order.

        Logits over the vocabulary are large: only one chunk of tokens has them at a time.
        """
        inputs = place(self.arrange(items, backward=False), self.base.device)
        self.bank.route = inputs.route
        states_ND = self.trunk(inputs.flat)
        size = GPU_CHUNK if states_ND.device.type == "cuda" else CHUNK
        for part_ND, targets_N in zip(
            torch.split(states_ND, size), torch.split(inputs.flat.targets_N, size), strict=True
        ):
            yield self.head.logits(part_ND), targets_N

    def run(self, inputs: PassInputs, criterion: Criterion, *, backward: bool) -> torch.Tensor:
        """Do a pass over inputs that are on the device; see `losses`. Nothing is read from the host."""
        self.bank.route = inputs.route
        states_ND = self.trunk(inputs.flat)
        loss, losses_N = head_loss(states_ND, self.head, criterion, inputs.weights_N)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
        # One row after the other, in order, so that two runs on a GPU give the same bits too.
        return torch.segment_reduce(
            losses_N.detach().double(), "sum", offsets=inputs.flat.learnt_B, unsafe=True, initial=0.0
        )

    def _recorded(
        self,
        shelf: Shelf[RecordedInputs],
        arrays: PassArrays,
        criterion: Criterion | None,
        *,
        backward: bool,
    ) -> torch.Tensor:
        """Do a pass that is padded, by a recording where there is one; see `losses`."""
        room = rounded_up(arrays.sizes)
        arrays = padded(arrays, room)
        make = partial(recorded_inputs, arrays, criterion, self.base.device)

        def run(made: RecordedInputs) -> torch.Tensor:
            return self.run(made.inputs, made.criterion, backward=backward)

        addresses = self.bank.addresses(backward=backward)
        drops = bool(arrays.noise)
        kind = addresses, backward, drops, kind_of(criterion), torch.is_inference_mode_enabled()
        changed = self.bank.grad_SP if backward else self.bank.grad_SP[:0]
        recording = shelf.find(kind, room, make, run, changed)
        if recording is None:
            return run(make())
        recording.inputs.refill(arrays, criterion)
        return recording.replay().clone()  # the next replay writes to the same place

    def arrange(self, items: Sequence[Item], *, backward: bool) -> PassArrays:
        """Return what a pass over the samples consists of."""
        # What rows share must have one adapter, one gradient where those are wanted, and no noise of its own.
        owners = [(item.client, item.slot if backward else 0, item.seed) for item in items]
        arranged = arrange([item.row for item in items], owners)
        clients, slots, _ = zip(*(owner for owner, _ in groupby(owners)), strict=True)
        weights_B = np.array([item.weight for item in items])
        weights_N = weights_B.repeat(np.diff(arranged.arrays["learnt_B"]))
        noise = noisy_rows(
            arranged.begins_B.tolist(),
            [len(item.row.tokens) for item in items],
            [item.dropout for item in items],
            [item.seed for item in items],
        )
        dtype = str(self.bank.dtype).removeprefix("torch.")
        return PassArrays(
            {
                **arranged.arrays,
                "weights_N": weights_N.astype(dtype),
                **drop_arrays(noise, int(arranged.lengths_G.sum())),
            },
            arranged.longest,
            arranged.lengths_G,
            np.array(clients),
            np.array(slots),
            len(self.bank.grad_SP) if backward else 1,
            noise,
        )


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
