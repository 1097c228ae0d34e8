"""The products of the LoRA operator as Triton kernels; `fedllm.engine.triton.lora` launches them.

Arguments: `rows` holds the clients' factors, `stride_*` is from one row of a tensor to the next, a0 to b2 say
where in a row each matrix of a group begins, o0 to o2 how many outputs it has. `begins` and `ends` are the
tokens of a tile or a slot. Rows of zeros fill blocks up, so nothing of another tile or slot is read.
Tensor suffixes: T token, R rank, J rank of any of the group's matrices, I input feature, O output feature.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes every annotation of a kernel for its own.

import triton
import triton.language as tl


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
def activations_kernel(
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
def outputs_kernel(
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
def activation_gradients_kernel(
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
def input_gradients_kernel(
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
def grad_b_kernel(
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
def grad_a_kernel(
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
