"""Many adapters on one resident model: a row of parameters and a row of gradients for every slot.

A slot is a client, or one example where gradients are wanted per example: then many slots share the
parameters of one client. Clients' parameters are `theta` [C, P], slots' gradients `grad` [S, P]; the factors
of every layer are views of their rows, so clipping and stepping cost a dozen kernels whatever the depth.
Tensor suffixes: C client, S slot, P flat adapter, R rank, D feature.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.lora.dropout import NoisyRow, keep_mask


@dataclass(frozen=True)
class Segment:
    """Tokens [begin, end) of the current pass belong to row `row` of the bank."""

    begin: int
    end: int
    row: int


@dataclass(frozen=True)
class Route:
    """Whose tokens a pass holds: by client for parameters, by slot for gradients. Both cover all tokens."""

    clients: tuple[Segment, ...]
    slots: tuple[Segment, ...]
    noise: tuple[NoisyRow, ...] = ()  # the pass's rows, where adapters drop inputs


def segments(lengths: Sequence[int], rows: Sequence[int]) -> tuple[Segment, ...]:
    """Return consecutive token runs as segments; neighbours of the same row become one."""
    merged: list[Segment] = []
    begin = 0
    for length, row in zip(lengths, rows, strict=True):
        if merged and merged[-1].row == row:
            merged[-1] = Segment(merged[-1].begin, begin + length, row)
        else:
            merged.append(Segment(begin, begin + length, row))
        begin += length
    return tuple(merged)


class Kernel(Protocol):
    """How the LoRA operator is computed; `fedllm.lora.kernels` has two."""

    def forward(self, bank: "Bank", index: int, x_TI: torch.Tensor, y_TO: torch.Tensor) -> torch.Tensor:
        """Add the adapters' output to y in place and return what backward needs."""

    def backward(
        self,
        bank: "Bank",
        index: int,
        x_TI: torch.Tensor,
        z_TR: torch.Tensor,
        g_TO: torch.Tensor,
        dx_TI: torch.Tensor | None,
    ) -> None:
        """Add every slot's gradients to the bank and the adapters' part of dx to dx."""


class Bank:
    """The parameters and gradients of one pass. `route` says which tokens belong to which row."""

    def __init__(self, layout: AdapterLayout, kernel: Kernel, device: torch.device, dtype: torch.dtype):
        self.layout = layout
        self.kernel = kernel
        self.device = device
        self.dtype = dtype
        self.theta_CP = torch.zeros(0, layout.size, device=device, dtype=dtype)
        self.grad_SP = torch.zeros(0, layout.size, device=device, dtype=dtype)
        self.scales: tuple[float, ...] = ()
        self.route = Route((), ())
        self.batch_rows: tuple[int, ...] = ()  # while generating: the client of each row of the batch
        self.tap = torch.zeros((), device=device, requires_grad=True)

    def keep_mask(self, index: int, x_TI: torch.Tensor) -> torch.Tensor | None:
        """Return what LoRA dropout multiplies the input of matrix `index` by, or None where there is none."""
        return keep_mask(self.route.noise, index, x_TI) if self.route.noise else None

    def load(self, starts: Sequence[torch.Tensor], scales: Sequence[float]) -> None:
        """Hold one row of parameters per start vector [P], each with its factor alpha / rank."""
        if self.theta_CP.shape[0] != len(starts):
            self.theta_CP = self._rows(len(starts))
        for row, start in zip(self.theta_CP, starts, strict=True):
            row.copy_(start)
        self.scales = tuple(scales)

    def reserve(self, num_slots: int) -> None:
        """Hold exactly `num_slots` rows of zero gradients."""
        if self.grad_SP.shape[0] == num_slots:
            self.grad_SP.zero_()
        else:
            self.grad_SP = self._rows(num_slots)

    def _rows(self, number: int) -> torch.Tensor:
        """Return zero rows [number, P] that training may use even if evaluation asked for them first."""
        with torch.inference_mode(False):
            return torch.zeros(number, self.layout.size, device=self.device, dtype=self.dtype)

    def route_of(self, num_tokens: int) -> Route:
        """Return whose the `num_tokens` tokens of a layer's input are."""
        if not self.batch_rows:
            return self.route
        length = num_tokens // len(self.batch_rows)
        clients = segments([length] * len(self.batch_rows), self.batch_rows)
        return Route(clients, ())

    @contextmanager
    def whole_rows(self, rows: Sequence[int]) -> Iterator[None]:
        """Within the block, row i of every batch [B, t, D] belongs to client `rows[i]`, whatever t is."""
        self.batch_rows = tuple(rows)
        try:
            yield
        finally:
            self.batch_rows = ()

    def factors(self, index: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (A [n, R, D_in], B [n, D_out, R]) of matrix `index` as views of `rows` [n, P]."""
        return factors_of(self.layout, index, rows)


def factors_of(layout: AdapterLayout, index: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A [n, R, D_in], B [n, D_out, R]) of matrix `index` as views of `rows` [n, P]."""
    a_spec, b_spec = layout.tensors[2 * index : 2 * index + 2]
    # A row's part of a factor is contiguous, so splitting its last axis is a view.
    a = rows[:, a_spec.offset : a_spec.offset + a_spec.size].view(len(rows), *a_spec.shape)
    b = rows[:, b_spec.offset : b_spec.offset + b_spec.size].view(len(rows), *b_spec.shape)
    return a, b
