"""The LoRA operator in six Triton kernels, for any number of clients, slots and tokens of each.

Tokens of one client are neighbours. A program takes a tile of at most 64 of them, and so meets one client's
factors; no zeros are multiplied. Gradients are summed slot by slot, and a long slot is split among programs,
whose sums are added in a fixed order: two runs give the same bits. A group has up to three matrices.
Products are of the base model's dtype and accumulate in float32. The plain twin is `LoopKernel`.
Tensor suffixes: T token, C client, S slot, J rank of any of the group's matrices, I input feature, O output
feature.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch

from fedllm.engine.adapter_bank import Bank, Group, Kept
from fedllm.engine.route_tensors import TILE
from fedllm.engine.triton.lora_kernels import (
    activation_gradients_kernel,
    activations_kernel,
    grad_a_kernel,
    grad_b_kernel,
    input_gradients_kernel,
    outputs_kernel,
)

_BLOCK = TILE  # features that a program takes at a time, and tokens
_MOST_RANKS = 64  # that a program takes at a time; more do not fit into the fast memory of small GPUs
_LONG_SLOT = 1024  # tokens; longer ones are split in parts of about half as many
_MOST_PARTS = 32


@dataclass(frozen=True)
class TritonKernel:
    """For base models in float32, bfloat16 or float16; see `fedllm.engine.adapter_bank.Kernel`."""

    keeps_rows_apart: ClassVar[bool] = True

    def forward(self, bank: Bank, group: Group, x_TI: torch.Tensor, y_TO: torch.Tensor) -> torch.Tensor:
        """Add the adapters' outputs to y in place; return the scaled activations z [T, J]."""
        x_TI, sizes, tiles = _dense(x_TI), _sizes(bank, group), _tiles(bank, len(x_TI))
        z_TJ = _empty(x_TI, sizes.num_ranks)
        rows, *places = _held(bank, "a", group)
        strides = (x_TI.stride(0), rows.stride(0), z_TJ.stride(0))
        activations_kernel[len(tiles[0]), _blocks(sizes.num_ranks, sizes.block_j)](
            *(x_TI, rows, z_TJ, *tiles, bank.scales_C, *strides, sizes.num_inputs, *places),
            **sizes.of_group,
        )
        rows, *places = _held(bank, "b", group)
        strides = (z_TJ.stride(0), rows.stride(0), y_TO.stride(0))
        outputs_kernel[len(tiles[0]), sizes.output_blocks](
            *(z_TJ, rows, y_TO, *tiles, *strides, *places, *sizes.outputs), **sizes.of_matrix
        )
        return z_TJ

    def backward(
        self, bank: Bank, group: Group, kept: Kept, g_TO: torch.Tensor, dx_TI: torch.Tensor | None
    ) -> None:
        """Add every slot's gradients to the bank, and the adapters' part of dx to dx in place."""
        g_TO, sizes, tiles = _dense(g_TO), _sizes(bank, group), _tiles(bank, len(g_TO))
        if bank.trained != "a" and kept.z_TM is not None:
            _add_grad_b(bank, group, g_TO, _dense(kept.z_TM))
        if bank.trained == "b" and dx_TI is None:  # nothing else needs the gradient of z
            return
        dz_TJ = _empty(g_TO, sizes.num_ranks)
        rows, *places = _held(bank, "b", group)
        strides = (g_TO.stride(0), rows.stride(0), dz_TJ.stride(0))
        activation_gradients_kernel[len(tiles[0]), len(group) * sizes.rank_blocks](
            *(g_TO, rows, dz_TJ, *tiles, bank.scales_C, *strides, *places, *sizes.outputs), **sizes.of_matrix
        )
        if bank.trained != "b" and kept.x_TI is not None:
            _add_grad_a(bank, group, dz_TJ, _dense(kept.x_TI))
        if dx_TI is not None:
            rows, *places = _held(bank, "a", group)
            strides = (dz_TJ.stride(0), rows.stride(0), dx_TI.stride(0))
            input_gradients_kernel[len(tiles[0]), _blocks(sizes.num_inputs, _BLOCK)](
                *(dz_TJ, rows, dx_TI, *tiles, *strides, sizes.num_inputs, *places),
                **sizes.of_group,
            )


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a group of matrices, and how they are cut into blocks."""

    rank: int
    num_inputs: int
    outputs: tuple[int, int, int]  # 0 where the group has fewer matrices
    num_ranks: int  # of all matrices

    @property
    def block_r(self) -> int:
        """Ranks of one matrix that a program takes; a product of tensor cores has 16 at least."""
        return min(_MOST_RANKS, max(16, _power_of_two(self.rank)))

    @property
    def block_j(self) -> int:
        """Ranks of all matrices that a program takes."""
        return min(_MOST_RANKS, max(16, _power_of_two(self.num_ranks)))

    @property
    def rank_blocks(self) -> int:
        """Blocks of one matrix's ranks."""
        return _blocks(self.rank, self.block_r)

    @property
    def output_blocks(self) -> int:
        """Blocks of outputs, none of which has columns of two matrices."""
        return sum(_blocks(size, _BLOCK) for size in self.outputs)

    @property
    def of_matrix(self) -> dict[str, int]:
        """What kernels that take one matrix at a time are compiled for."""
        return {"R": self.rank, "BLOCK": _BLOCK, "BLOCK_R": self.block_r}

    @property
    def of_group(self) -> dict[str, int]:
        """What kernels that take all matrices at once are compiled for."""
        return {"R": self.rank, "NUM_RANKS": self.num_ranks, "BLOCK": _BLOCK, "BLOCK_J": self.block_j}


def _sizes(bank: Bank, group: Group) -> _Sizes:
    matrices = [bank.layout.matrices[index] for index in group]
    outputs = _three([matrix.out_features for matrix in matrices])
    return _Sizes(bank.layout.rank, matrices[0].in_features, outputs, len(group) * bank.layout.rank)


def _held(bank: Bank, factor: str, group: Group) -> tuple[torch.Tensor, int, int, int]:
    """Return the rows that hold a factor of the group's matrices, and where in a row each matrix begins."""
    rows, specs = bank.held(factor, group)
    return rows, *_three([spec.offset for spec in specs])


def _tiles(bank: Bank, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = bank.route_of(num_tokens).tensors
    return tensors.tile_begin, tensors.tile_end, tensors.tile_client


def _add_grad_b(bank: Bank, group: Group, g_TO: torch.Tensor, z_TJ: torch.Tensor) -> None:
    """Add dB of every slot to the bank."""
    sizes, strides = _sizes(bank, group), (g_TO.stride(0), z_TJ.stride(0))
    with _sums(bank, "b", group, len(g_TO)) as out:
        grid = (out.num_slots, sizes.output_blocks * sizes.rank_blocks, out.num_parts)
        arguments = (g_TO, z_TJ, out.values, *out.slots, *strides, *out.strides, *out.places, *sizes.outputs)
        grad_b_kernel[grid](*arguments, **out.settings, **sizes.of_matrix)


def _add_grad_a(bank: Bank, group: Group, dz_TJ: torch.Tensor, x_TI: torch.Tensor) -> None:
    """Add dA of every slot to the bank."""
    sizes, strides = _sizes(bank, group), (dz_TJ.stride(0), x_TI.stride(0))
    with _sums(bank, "a", group, len(x_TI)) as out:
        blocks = _blocks(sizes.num_inputs, _BLOCK) * _blocks(sizes.num_ranks, sizes.block_j)
        arguments = (dz_TJ, x_TI, out.values, *out.slots, *strides, *out.strides)
        grad_a_kernel[out.num_slots, blocks, out.num_parts](
            *arguments, sizes.num_inputs, *out.places, **out.settings, **sizes.of_group
        )


@dataclass(frozen=True, eq=False)
class _Sums:
    """Where a kernel puts the gradients of every slot: in the bank's rows, or in parts to be added up."""

    values: torch.Tensor
    slots: tuple[torch.Tensor, torch.Tensor]  # where the tokens of each begin and end
    strides: tuple[int, int]  # from slot to slot and from part to part
    places: tuple[int, int, int]  # of each matrix in a slot's values
    num_parts: int

    @property
    def num_slots(self) -> int:
        """Slots of the pass."""
        return len(self.slots[0])

    @property
    def settings(self) -> dict[str, int]:
        """What a kernel is compiled for."""
        return {"ADD": self.num_parts == 1, "PARTS": self.num_parts}


@contextmanager
def _sums(bank: Bank, factor: str, group: Group, num_tokens: int) -> Iterator[_Sums]:
    """Yield where to put a factor's gradients; at the end of the block the bank has them."""
    tensors, (_, specs) = bank.route.tensors, bank.held(factor, group)
    slots, rows = (tensors.slot_begin_S, tensors.slot_end_S), bank.grad_SP
    num_slots, places, widths = len(slots[0]), [s.offset for s in specs], [s.size for s in specs]
    length = num_tokens / max(1, num_slots)
    if length <= _LONG_SLOT:
        yield _Sums(rows, slots, (rows.stride(0), 0), _three(places), 1)
        return
    num_parts = min(_MOST_PARTS, _power_of_two(math.ceil(2 * length / _LONG_SLOT)))
    parts = rows.new_empty(num_parts, num_slots, sum(widths))
    starts = _three([0, *accumulate(widths)])
    yield _Sums(parts, slots, (parts.stride(1), parts.stride(0)), starts, num_parts)
    for place, total in zip(places, torch.split(parts.sum(dim=0), widths, dim=1), strict=True):
        rows[:num_slots, place : place + total.shape[1]].add_(total)


def _empty(like_TD: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return activations [T, num_ranks] to be filled; rows begin where 16 values can be read at once."""
    return like_TD.new_empty(len(like_TD), _blocks(num_ranks, 16) * 16)[:, :num_ranks]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix whose rows are each one stretch of memory."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    """Return the values of up to three matrices, zeros for those a group lacks."""
    first, second, third = (*values, 0, 0, 0)[:3]
    return first, second, third


def _blocks(size: int, block: int) -> int:
    """Return how many blocks hold `size` values."""
    return -(-size // block)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
