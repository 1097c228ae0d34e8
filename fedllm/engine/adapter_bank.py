"""Many adapters on one resident model: a row of parameters and a row of gradients for every slot.

A slot is a client, or one example where gradients are wanted per example: then many slots share the
parameters of one client. Clients' parameters are `theta` [C, P], slots' gradients `grad` [S, P]; the factors
of every layer are views of their rows, so clipping and stepping cost a dozen kernels at any depth.
Where one factor alone is trained, P is the size of that part. The other lies apart in `frozen` [C, Q], where
clipping and stepping cannot reach it.
Tensor suffixes: C client, S slot, P trained values of an adapter, Q frozen ones, T token, R rank, M ranks of
a group, D feature.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
import torch

from fedllm.adapters.layout import AdapterLayout, TensorSpec
from fedllm.adapters.parts import other_part, part_of, part_size, part_specs
from fedllm.engine.dropout import Noise, keep_mask
from fedllm.engine.pass_buffer import PassBuffer
from fedllm.engine.route_tensors import RouteTensors, route_arrays, route_tensors
from fedllm.errors import ModelError

Group = tuple[int, ...]  # up to three adapted matrices that share one input, as places in the layout


@dataclass(frozen=True)
class Segment:
    """Tokens [begin, end) of the current pass belong to row `row` of the bank."""

    begin: int
    end: int
    row: int


@dataclass(frozen=True, eq=False)
class Route:
    """Where the tokens of a pass belong: to clients for parameters, to slots for gradients.

    The segments are for a loop over them on the host, the tensors say the same to kernels on a device.
    """

    clients: tuple[Segment, ...]
    slots: tuple[Segment, ...]
    tensors: RouteTensors
    noise: Noise | None = None  # where adapters drop inputs


@dataclass(frozen=True, eq=False)
class Kept:
    """What a kernel's backward pass needs of its forward pass: the adapters' input x and activations z.

    x is None where A is frozen, z where B is: only the other factor's gradient needs them.
    """

    x_TI: torch.Tensor | None
    z_TM: torch.Tensor | None


class Kernel(Protocol):
    """How the LoRA operator is computed for a group of matrices.

    `fedllm.engine.kernels` has two, `fedllm.engine.triton.lora` one for a GPU.
    """

    keeps_rows_apart: ClassVar[bool]  # a NaN of one row reaches no other row's gradient

    def forward(self, bank: "Bank", group: Group, x_TI: torch.Tensor, y_TO: torch.Tensor) -> torch.Tensor:
        """Add the adapters' outputs to y in place; return the scaled activations z [T, M].

        The outputs of the group's matrices lie side by side in y, and in z the R activations of each.
        """

    def backward(
        self, bank: "Bank", group: Group, kept: Kept, g_TO: torch.Tensor, dx_TI: torch.Tensor | None
    ) -> None:
        """Add every slot's gradients to the bank, and the adapters' part of dx to dx in place."""


class Bank:
    """The parameters and gradients of one pass. `route` says which tokens belong to which row."""

    def __init__(self, layout: AdapterLayout, kernel: Kernel, device: torch.device, dtype: torch.dtype):
        self.kernel = kernel
        self.device = device
        self.dtype = dtype
        self._held: dict[str, torch.Tensor] = {}  # what the rows below are the first rows of
        self.load(layout, (), ())
        self.reserve(0)
        self.route = make_route([0], [0], [-1], 0, device)
        self.batch_rows: tuple[int, ...] = ()  # while generating: the client of each row of the batch
        self._batch_routes: dict[int, Route] = {}  # of those rows, by the number of their tokens
        # Autograd calls a backward pass only where an input requires a gradient, and no parameter is one.
        self.tap = torch.zeros((), device=device, requires_grad=True)

    def load(
        self,
        layout: AdapterLayout,
        starts: Sequence[torch.Tensor],
        scales: Sequence[float],
        trained: str = "both",
    ) -> None:
        """Hold one row of parameters per start vector of `layout`, each with its factor alpha / rank.

        Gradients are computed for the part `trained`.
        """
        self.layout, self.trained, self.scales = layout, trained, tuple(scales)
        self.scales_C = self._rows("scales", len(scales), 1)[:, 0]
        self.scales_C.copy_(torch.tensor(scales, dtype=self.dtype))
        self.places = {matrix.module: index for index, matrix in enumerate(layout.matrices)}
        rest = other_part(trained)
        self._moving, self._still = _specs_of_matrices(layout, trained), _specs_of_matrices(layout, rest)
        self.theta_CP = self._rows("theta", len(starts), part_size(layout, trained))
        self.frozen_CQ = self._rows("frozen", len(starts), part_size(layout, rest))
        rows: dict[int, int] = {}  # where each vector is: clients often share one, and a device is far away
        for row, start in enumerate(starts):
            first = rows.setdefault(id(start), row)
            for held, part in ((self.theta_CP, trained), (self.frozen_CQ, rest)):
                held[row].copy_(part_of(layout, start, part) if first == row else held[first])

    def reserve(self, num_slots: int) -> None:
        """Hold exactly `num_slots` rows of zero gradients."""
        self.grad_SP = self._rows("grad", num_slots, self.theta_CP.shape[1])
        self.grad_SP.zero_()

    def addresses(self, *, backward: bool) -> Hashable:
        """Return what must be equal for a recorded pass to find this bank's rows where it left them."""
        rows = (self.theta_CP, self.frozen_CQ, self.scales_C, *((self.grad_SP,) if backward else ()))
        places = tuple((held.data_ptr(), *held.shape) for held in rows)
        return tuple(self.places), self.layout.rank, self.trained, places  # layouts may be equally large

    def release(self) -> None:
        """Hold no rows, so that the memory of all that were ever needed is free."""
        self._held.clear()
        self.load(self.layout, (), ())
        self.reserve(0)

    def _rows(self, name: str, number: int, size: int) -> torch.Tensor:
        """Return rows of `size` values: those held under `name` where they fit, else new ones.

        A GPU keeps the most that were ever needed, since recorded passes know rows by their addresses.
        """
        held = self._held.get(name)
        room = 0 if held is None or held.shape[1] != size else len(held)
        if held is None or room < number or (room > number and self.device.type != "cuda"):
            with torch.inference_mode(False):  # rows made while evaluating must serve training too
                held = torch.zeros(number, size, device=self.device, dtype=self.dtype)
            self._held[name] = held
        return held[:number]

    def route_of(self, num_tokens: int) -> Route:
        """Return which rows the `num_tokens` tokens of a layer's input belong to.

        Raises:
            ModelError: they are not all tokens of the pass, so nothing tells whose they are.
        """
        if not self.batch_rows:
            if self.route.clients[-1].end != num_tokens:
                raise ModelError(
                    "lora.target-modules: a layer sees only some tokens of a row, as an expert of a mixture"
                    " does, and cannot be adapted; name other layers"
                )
            return self.route
        if num_tokens not in self._batch_routes:  # the same for all layers, and for every new token
            length = num_tokens // len(self.batch_rows)
            rows = self.batch_rows
            route = make_route([length] * len(rows), rows, [0] * len(rows), 1, self.device)
            self._batch_routes[num_tokens] = route
        return self._batch_routes[num_tokens]

    @contextmanager
    def whole_rows(self, rows: Sequence[int]) -> Iterator[None]:
        """Within the block, row i of every batch [B, t, D] belongs to client `rows[i]`, for any t."""
        self.batch_rows, self._batch_routes = tuple(rows), {}
        try:
            yield
        finally:
            self.batch_rows, self._batch_routes = (), {}

    def factors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (A [C, R, D_in], B [C, D_out, R]) of matrix `index` as views of the clients' rows."""
        moving = [spec.view(self.theta_CP) for spec in self._moving[index]]
        still = [spec.view(self.frozen_CQ) for spec in self._still[index]]
        a, b = still + moving if self.trained == "b" else moving + still
        return a, b

    def held(self, factor: str, group: Group) -> tuple[torch.Tensor, list[TensorSpec]]:
        """Return the rows that hold factor "a" or "b" of a group's matrices, and where in a row each lies.

        The gradients of a trained factor lie in the same places.
        """
        is_moving = self.trained in (factor, "both")
        specs = self._moving if is_moving else self._still
        place = int(self.trained == "both" and factor == "b")
        return self.theta_CP if is_moving else self.frozen_CQ, [specs[index][place] for index in group]

    def gradients(
        self, index: int, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (grad A [S, R, D_in], grad B [S, D_out, R]) as views; None where frozen.

        They are views of the slots' gradients, or of other `rows` [S, P] in place of them.
        """
        views = [spec.view(self.grad_SP if rows is None else rows) for spec in self._moving[index]]
        if self.trained == "both":
            return views[0], views[1]
        return (views[0], None) if self.trained == "a" else (None, views[0])

    def keep_mask(self, index: int, x_TI: torch.Tensor) -> torch.Tensor | None:
        """Return what multiplies the adapters' input at matrix `index`, [T, I]; None where all is kept."""
        return None if self.route.noise is None else keep_mask(self.route.noise, index, x_TI)


def make_route(
    lengths: Sequence[int], clients: Sequence[int], slots: Sequence[int], num_slots: int, device: torch.device
) -> Route:
    """Return the route of neighbouring runs of tokens, none of whose values are dropped."""
    arrays = route_arrays(np.array(lengths), np.array(clients), np.array(slots), num_slots)
    tensors = route_tensors(PassBuffer(arrays, device).tensors)
    # A token of no slot has no gradient, so a loop may count it among those of any.
    return Route(segments(lengths, clients), segments(lengths, [max(slot, 0) for slot in slots]), tensors)


def segments(lengths: Sequence[int], rows: Sequence[int]) -> tuple[Segment, ...]:
    """Return consecutive token runs as segments; neighbours of the same row become one."""
    merged: list[Segment] = []
    begin = 0
    for length, row in zip(lengths, rows, strict=True):
        if merged and merged[-1].row == row:
            merged[-1] = replace(merged[-1], end=begin + length)
        else:
            merged.append(Segment(begin, begin + length, row))
        begin += length
    return tuple(merged)


def _specs_of_matrices(layout: AdapterLayout, part: str) -> list[list[TensorSpec]]:
    """Return for every matrix where its tensors of a part lie in that part; none where the part is empty."""
    specs: list[list[TensorSpec]] = [[] for _ in layout.matrices]
    offset = 0
    for number, spec in enumerate(part_specs(layout, part)):
        # With both factors two neighbouring tensors belong to a matrix, otherwise one.
        specs[number // 2 if part == "both" else number].append(replace(spec, offset=offset))
        offset += spec.size
    return specs
