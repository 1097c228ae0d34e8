"""The LoRA operator in five Triton kernels, for any number of clients, slots and tokens of each.

Tokens of one client are neighbours. A program takes a tile of at most 64 of them, and so meets one client's
factors; no zeros are multiplied. Gradients are summed slot by slot, and a long slot is split among programs,
whose sums are added in a fixed order: two runs give the same bits. A group has up to three matrices.
Products are of the base model's dtype and accumulate in float32. The plain twin is `LoopKernel`.
Tensor suffixes: T token, C client, S slot, R rank, J rank of any of the group's matrices, I input feature,
O output feature.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes every annotation of a kernel for its own.

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
import triton
import triton.language as tl

from fedllm.engine.adapter_bank import Bank, Group, Kept
from fedllm.engine.route_tensors import TILE

_BLOCK = TILE  # features that a program takes at a time, and tokens
_MOST_RANKS = 64  # that a program takes at a time; more do not fit into the fast memory of small GPUs
_LONG_SLOT = 1024  # tokens; longer ones are split in parts of about half as many
_MOST_PARTS = 32


@triton.jit
def _of(matrix, first, second, third):
    """Return the value that belongs to a matrix of the group."""
    return tl.where(matrix == 0, first, tl.where(matrix == 1, second, third))


@triton.jit
def _output_block(block, o0, o1, o2, BLOCK: tl.constexpr):
    """Return (matrix, its first column in y, its columns of the block as [BLOCK], which of them it has)."""
    blocks0, blocks1 = (o0 + BLOCK - 1) // BLOCK, (o1 + BLOCK - 1) // BLOCK
    matrix = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    column = (block - _of(matrix, 0, blocks0, blocks0 + blocks1)) * BLOCK + tl.arange(0, BLOCK)
    return matrix, _of(matrix, 0, o0, o0 + o1), column, column < _of(matrix, o0, o1, o2)


@triton.jit
def _part_of_slot(begins, ends, slot, part, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Return the tokens [begin, end) of one part of a slot."""
    begin, end = tl.load(begins + slot), tl.load(ends + slot)
    size = ((end - begin + PARTS - 1) // PARTS + BLOCK - 1) // BLOCK * BLOCK
    begin += part * size
    return begin, tl.minimum(end, begin + size)


@triton.jit
def _activations_kernel(
    x, rows, z, begins, ends, clients, scales, stride_x, stride_row, stride_z, num_inputs,
    a0, a1, a2, R: tl.constexpr, NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Set z = scale x A^T of a tile."""
    tile = tl.program_id(0)
    begin, end = tl.load(begins + tile), tl.load(ends + tile)
    if begin < end:
        client = tl.load(clients + tile).to(tl.int64)
        t = begin + tl.arange(0, BLOCK)
        j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
        has_t, has_j = (t < end)[:, None], j < NUM_RANKS
        to_x = x + t[:, None].to(tl.int64) * stride_x
        to_a = rows + client * stride_row + (_of(j // R, a0, a1, a2) + (j % R) * num_inputs)[:, None]
        total = tl.zeros([BLOCK, BLOCK_J], tl.float32)
        for first in range(0, num_inputs, BLOCK):
            i = first + tl.arange(0, BLOCK)
            x_TI = tl.load(to_x + i[None, :], mask=has_t & (i < num_inputs)[None, :], other=0.0)
            a_JI = tl.load(to_a + i[None, :], mask=has_j[:, None] & (i < num_inputs)[None, :], other=0.0)
            total += tl.dot(x_TI, tl.trans(a_JI.to(x_TI.dtype)), input_precision="ieee")
        total *= tl.load(scales + client)
        to_z = z + t[:, None] * stride_z + j[None, :]
        tl.store(to_z, total.to(z.dtype.element_ty), mask=has_t & has_j[None, :])


@triton.jit
def _outputs_kernel(
    z, rows, y, begins, ends, clients, stride_z, stride_row, stride_y, b0, b1, b2, o0, o1, o2,
    R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Do y += z B^T of a tile and a block of outputs."""
    tile = tl.program_id(0)
    begin, end = tl.load(begins + tile), tl.load(ends + tile)
    if begin < end:
        client = tl.load(clients + tile).to(tl.int64)
        matrix, column, o, is_o = _output_block(tl.program_id(1), o0, o1, o2, BLOCK)
        t = begin + tl.arange(0, BLOCK)
        has_t, has_o = (t < end)[:, None], is_o[None, :]
        to_b = rows + client * stride_row + _of(matrix, b0, b1, b2) + o[None, :] * R
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for first in tl.static_range(0, R, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            to_z = z + t[:, None] * stride_z + matrix * R + r[None, :]
            z_TR = tl.load(to_z, mask=has_t & (r < R)[None, :], other=0.0)
            b_RO = tl.load(to_b + r[:, None], mask=has_o & (r < R)[:, None], other=0.0)
            total += tl.dot(z_TR, b_RO.to(z_TR.dtype), input_precision="ieee")
        to_y = y + t[:, None].to(tl.int64) * stride_y + column + o[None, :]
        total += tl.load(to_y, mask=has_t & has_o, other=0.0).to(tl.float32)
        tl.store(to_y, total.to(y.dtype.element_ty), mask=has_t & has_o)


@triton.jit
def _activation_gradients_kernel(
    g, rows, dz, begins, ends, clients, scales, stride_g, stride_row, stride_z, b0, b1, b2, o0, o1, o2,
    R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Set dz = scale g B of a tile and a block of one matrix's ranks."""
    tile = tl.program_id(0)
    begin, end = tl.load(begins + tile), tl.load(ends + tile)
    if begin < end:
        client = tl.load(clients + tile).to(tl.int64)
        blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
        matrix = tl.program_id(1) // blocks
        r = tl.program_id(1) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        t = begin + tl.arange(0, BLOCK)
        has_t, has_r, num_outputs = (t < end)[:, None], (r < R)[None, :], _of(matrix, o0, o1, o2)
        to_g = g + t[:, None].to(tl.int64) * stride_g + _of(matrix, 0, o0, o0 + o1)
        to_b = rows + client * stride_row + _of(matrix, b0, b1, b2) + r[None, :]
        total = tl.zeros([BLOCK, BLOCK_R], tl.float32)
        for first in range(0, num_outputs, BLOCK):
            o = first + tl.arange(0, BLOCK)
            g_TO = tl.load(to_g + o[None, :], mask=has_t & (o < num_outputs)[None, :], other=0.0)
            b_OR = tl.load(to_b + o[:, None] * R, mask=has_r & (o < num_outputs)[:, None], other=0.0)
            total += tl.dot(g_TO, b_OR.to(g_TO.dtype), input_precision="ieee")
        total *= tl.load(scales + client)
        to_dz = dz + t[:, None] * stride_z + matrix * R + r[None, :]
        tl.store(to_dz, total.to(dz.dtype.element_ty), mask=has_t & has_r)


@triton.jit
def _input_gradients_kernel(
    dz, rows, dx, begins, ends, clients, stride_z, stride_row, stride_x, num_inputs, a0, a1, a2,
    R: tl.constexpr, NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Do dx += dz A of a tile and a block of inputs."""
    tile = tl.program_id(0)
    begin, end = tl.load(begins + tile), tl.load(ends + tile)
    if begin < end:
        client = tl.load(clients + tile).to(tl.int64)
        t = begin + tl.arange(0, BLOCK)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        has_t, has_i = (t < end)[:, None], (i < num_inputs)[None, :]
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for first in tl.static_range(0, NUM_RANKS, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            to_a = rows + client * stride_row + (_of(j // R, a0, a1, a2) + (j % R) * num_inputs)[:, None]
            has_j = j < NUM_RANKS
            to_dz = dz + t[:, None] * stride_z + j[None, :]
            dz_TJ = tl.load(to_dz, mask=has_t & has_j[None, :], other=0.0)
            a_JI = tl.load(to_a + i[None, :], mask=has_j[:, None] & has_i, other=0.0)
            total += tl.dot(dz_TJ, a_JI.to(dz_TJ.dtype), input_precision="ieee")
        to_dx = dx + t[:, None].to(tl.int64) * stride_x + i[None, :]
        total += tl.load(to_dx, mask=has_t & has_i, other=0.0).to(tl.float32)
        tl.store(to_dx, total.to(dx.dtype.element_ty), mask=has_t & has_i)


@triton.jit
def _grad_b_kernel(
    g, z, out, begins, ends, stride_g, stride_z, stride_slot, stride_part, b0, b1, b2, o0, o1, o2,
    ADD: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum dB = g^T z of a part of a slot, a block of outputs and one of ranks."""
    slot, part = tl.program_id(0), tl.program_id(2)
    begin, end = _part_of_slot(begins, ends, slot, part, BLOCK, PARTS)
    blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    matrix, column, o, is_o = _output_block(tl.program_id(1) // blocks, o0, o1, o2, BLOCK)
    r = tl.program_id(1) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    has_o, has_r = is_o[:, None], (r < R)[None, :]
    total = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    for first in range(begin, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        has_t = (t < end)[:, None]
        to_g = g + t[:, None].to(tl.int64) * stride_g + column + o[None, :]
        g_TO = tl.load(to_g, mask=has_t & is_o[None, :], other=0.0)
        z_TR = tl.load(z + t[:, None] * stride_z + matrix * R + r[None, :], mask=has_t & has_r, other=0.0)
        total += tl.dot(tl.trans(g_TO), z_TR, input_precision="ieee")
    to_out = out + part.to(tl.int64) * stride_part + slot.to(tl.int64) * stride_slot
    to_out += _of(matrix, b0, b1, b2) + o[:, None] * R + r[None, :]
    if ADD:
        total += tl.load(to_out, mask=has_o & has_r, other=0.0)
    tl.store(to_out, total, mask=has_o & has_r)


@triton.jit
def _grad_a_kernel(
    dz, x, out, begins, ends, stride_z, stride_x, stride_slot, stride_part, num_inputs, a0, a1, a2,
    ADD: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Sum dA = dz^T x of a part of a slot, a block of inputs and one of ranks."""
    slot, part = tl.program_id(0), tl.program_id(2)
    begin, end = _part_of_slot(begins, ends, slot, part, BLOCK, PARTS)
    blocks: tl.constexpr = (NUM_RANKS + BLOCK_J - 1) // BLOCK_J
    i = tl.program_id(1) // blocks * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    has_i, has_j = (i < num_inputs)[None, :], j < NUM_RANKS
    total = tl.zeros([BLOCK, BLOCK_J], tl.float32)  # transposed: the longer side of a product comes first
    for first in range(begin, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        has_t = (t < end)[:, None]
        x_TI = tl.load(x + t[:, None].to(tl.int64) * stride_x + i[None, :], mask=has_t & has_i, other=0.0)
        dz_TJ = tl.load(dz + t[:, None] * stride_z + j[None, :], mask=has_t & has_j[None, :], other=0.0)
        total += tl.dot(tl.trans(x_TI), dz_TJ, input_precision="ieee")
    grad_JI = tl.trans(total)
    to_out = out + part.to(tl.int64) * stride_part + slot.to(tl.int64) * stride_slot
    to_out += (_of(j // R, a0, a1, a2) + (j % R) * num_inputs)[:, None] + i[None, :]
    if ADD:
        grad_JI += tl.load(to_out, mask=has_j[:, None] & has_i, other=0.0)
    tl.store(to_out, grad_JI, mask=has_j[:, None] & has_i)


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
        _activations_kernel[len(tiles[0]), triton.cdiv(sizes.num_ranks, sizes.block_j)](
            *(x_TI, rows, z_TJ, *tiles, bank.scales_C, *strides, sizes.num_inputs, *places),
            **sizes.of_group,
        )
        rows, *places = _held(bank, "b", group)
        strides = (z_TJ.stride(0), rows.stride(0), y_TO.stride(0))
        _outputs_kernel[len(tiles[0]), sizes.output_blocks](
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
        _activation_gradients_kernel[len(tiles[0]), len(group) * sizes.rank_blocks](
            *(g_TO, rows, dz_TJ, *tiles, bank.scales_C, *strides, *places, *sizes.outputs), **sizes.of_matrix
        )
        if bank.trained != "b" and kept.x_TI is not None:
            _add_grad_a(bank, group, dz_TJ, _dense(kept.x_TI))
        if dx_TI is not None:
            rows, *places = _held(bank, "a", group)
            strides = (dz_TJ.stride(0), rows.stride(0), dx_TI.stride(0))
            _input_gradients_kernel[len(tiles[0]), triton.cdiv(sizes.num_inputs, _BLOCK)](
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
        return -(-self.rank // self.block_r)

    @property
    def output_blocks(self) -> int:
        """Blocks of outputs, none of which has columns of two matrices."""
        return sum(-(-size // _BLOCK) for size in self.outputs)

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
        _grad_b_kernel[grid](*arguments, **out.settings, **sizes.of_matrix)


def _add_grad_a(bank: Bank, group: Group, dz_TJ: torch.Tensor, x_TI: torch.Tensor) -> None:
    """Add dA of every slot to the bank."""
    sizes, strides = _sizes(bank, group), (dz_TJ.stride(0), x_TI.stride(0))
    with _sums(bank, "a", group, len(x_TI)) as out:
        blocks = triton.cdiv(sizes.num_inputs, _BLOCK) * triton.cdiv(sizes.num_ranks, sizes.block_j)
        arguments = (dz_TJ, x_TI, out.values, *out.slots, *strides, *out.strides)
        _grad_a_kernel[out.num_slots, blocks, out.num_parts](
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
    for place, total in zip(places, parts.sum(dim=0).split(widths, dim=1), strict=True):
        rows[:num_slots, place : place + total.shape[1]].add_(total)


def _empty(like_TD: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return activations [T, num_ranks] to be filled; rows begin where 16 values can be read at once."""
    return like_TD.new_empty(len(like_TD), -(-num_ranks // 16) * 16)[:, :num_ranks]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix whose rows are each one stretch of memory."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    """Return the values of up to three matrices, zeros for those a group lacks."""
    first, second, third = (*values, 0, 0, 0)[:3]
    return first, second, third


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
