"""The noise of private training where the gradients are: ChaCha20, hash and Gaussian as Triton kernels.

The fast twin of `SecretStream`, `keyed_hash` and `gaussian`, which serve a CPU: the same bits of stream and
hash, and Gaussian values that differ by a few units in the last place of float64, as logarithm and sine do
between machines. A lane makes one block of ChaCha20: 16 words, 8 integers of 64 bits, 4 pairs of
Gaussian values. The sums of the hash are of integers, so no order of adding changes them.
Tensor suffixes: B row (one client's mean gradient), N word of 32 bits, Q value.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes every annotation of a kernel for its own.

import math

import torch
import triton
import triton.language as tl

_LANES = 128
_TURN = tl.constexpr(2.0**-53 * 2.0 * math.pi)


@triton.jit
def _turned(word, number: tl.constexpr):
    return (word << number) | (word >> (32 - number))


@triton.jit
def _quarter(a, b, c, d):
    """Return the quarter round of four words (RFC 8439, section 2.1)."""
    a += b
    d = _turned(d ^ a, 16)
    c += d
    b = _turned(b ^ c, 12)
    a += b
    d = _turned(d ^ a, 8)
    c += d
    b = _turned(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _word(words, place: tl.constexpr, block):
    return tl.load(words + place).to(tl.uint32, bitcast=True) + tl.zeros_like(block)


@triton.jit
def _wide(low, high):
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def _integers(key, first, block):
    """Return the 64-bit integers of blocks of ChaCha20 (RFC 8439, section 2.3): of even and of odd places.

    Each is [lanes, 2, 2], so that joined and reshaped they stand in the order of the stream. `key` points to
    8 words, `first` to the 4 words that are counter and nonce of block 0.
    """
    s0 = tl.full(block.shape, 0x61707865, tl.uint32)
    s1 = tl.full(block.shape, 0x3320646E, tl.uint32)
    s2 = tl.full(block.shape, 0x79622D32, tl.uint32)
    s3 = tl.full(block.shape, 0x6B206574, tl.uint32)
    s4, s5, s6, s7 = _word(key, 0, block), _word(key, 1, block), _word(key, 2, block), _word(key, 3, block)
    s8, s9, s10, s11 = _word(key, 4, block), _word(key, 5, block), _word(key, 6, block), _word(key, 7, block)
    s12, s13 = _word(first, 0, block) + block, _word(first, 1, block)
    s14, s15 = _word(first, 2, block), _word(first, 3, block)
    x0, x1, x2, x3, x4, x5, x6, x7 = s0, s1, s2, s3, s4, s5, s6, s7
    x8, x9, x10, x11, x12, x13, x14, x15 = s8, s9, s10, s11, s12, s13, s14, s15
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    even = tl.join(
        tl.join(_wide(x0 + s0, x1 + s1), _wide(x8 + s8, x9 + s9)),
        tl.join(_wide(x4 + s4, x5 + s5), _wide(x12 + s12, x13 + s13)),
    )
    odd = tl.join(
        tl.join(_wide(x2 + s2, x3 + s3), _wide(x10 + s10, x11 + s11)),
        tl.join(_wide(x6 + s6, x7 + s7), _wide(x14 + s14, x15 + s15)),
    )
    return even, odd


@triton.jit
def _stream_kernel(keys, firsts, out, size, LANES: tl.constexpr):
    row = tl.program_id(1)
    begin = tl.program_id(0) * LANES
    block = (begin + tl.arange(0, LANES)).to(tl.uint32)
    even, odd = _integers(keys + 8 * row, firsts + 4 * row, block)
    place = 8 * begin + tl.arange(0, 8 * LANES)
    integers = tl.join(even, odd).reshape(8 * LANES).to(tl.int64, bitcast=True)
    tl.store(out + row.to(tl.int64) * size + place, integers, mask=place < size)


@triton.jit
def _hash_kernel(keys, firsts, words, stride, size, sums, LANES: tl.constexpr):
    row = tl.program_id(1)
    begin = tl.program_id(0) * LANES
    block = (begin + tl.arange(0, LANES)).to(tl.uint32)
    even, odd = _integers(keys + 8 * row, firsts, block)
    key = tl.join(even, odd).reshape(8 * LANES).to(tl.int64, bitcast=True)
    place = 8 * begin + tl.arange(0, 8 * LANES)
    start = words + row.to(tl.int64) * stride
    own = tl.load(start + place, mask=place < size, other=0)
    before = tl.load(start + place - 1, mask=(place > 0) & (place <= size), other=0)
    # Extended by zeros: a word is a number from 0 to 2^32 - 1.
    first = tl.sum(key * own.to(tl.uint32, bitcast=True).to(tl.int64))
    second = tl.sum(key * before.to(tl.uint32, bitcast=True).to(tl.int64))
    total = sums + 2 * (row * tl.num_programs(0) + tl.program_id(0))
    tl.store(total, first)
    tl.store(total + 1, second)


@triton.jit
def _gaussian_kernel(keys, firsts, deviations, values, stride, size, LANES: tl.constexpr):
    row = tl.program_id(1)
    begin = tl.program_id(0) * LANES
    block = (begin + tl.arange(0, LANES)).to(tl.uint32)
    even, odd = _integers(keys + 16 * row, firsts, block)
    uniform = ((even >> 11).to(tl.float64) + 1.0) * 2.0**-53
    radius = tl.sqrt(tl.log(uniform) * -2.0) * tl.load(deviations + row)
    angle = (odd >> 11).to(tl.float64) * _TURN
    noise = tl.join(radius * tl.cos(angle), radius * tl.sin(angle)).reshape(8 * LANES)
    place = 8 * begin + tl.arange(0, 8 * LANES)
    target = values + row.to(tl.int64) * stride + place
    value = tl.load(target, mask=place < size, other=0.0)
    tl.store(target, value + noise.to(value.dtype), mask=place < size)


def integers(keys_B8: torch.Tensor, firsts_B4: torch.Tensor, size: int) -> torch.Tensor:
    """Return the first `size` 64-bit integers of every row's stream, [B, size].

    Keys and counter and nonce are words of 32 bits (int32).
    """
    out = torch.empty(len(keys_B8), size, dtype=torch.int64, device=keys_B8.device)
    _stream_kernel[_grid(size, len(keys_B8))](keys_B8, firsts_B4, out, size, LANES=_LANES)
    return out


def keyed_hashes(keys_B8: torch.Tensor, values_BQ: torch.Tensor) -> torch.Tensor:
    """Return `fedllm.privacy.keys.keyed_hash` of every row's bits under its key, as words [B, 4] (int32)."""
    words_BN = values_BQ.view(torch.int32)
    rows, size = words_BN.shape
    grid = _grid(size + 1, rows)
    sums = torch.empty(rows, grid[0], 2, dtype=torch.int64, device=keys_B8.device)
    start = keys_B8.new_zeros(4)
    _hash_kernel[grid](keys_B8, start, words_BN, words_BN.stride(0), size, sums, LANES=_LANES)
    return sums.sum(dim=1).view(torch.int32)


def add_gaussian(
    step_keys_B8: torch.Tensor, hashes_B4: torch.Tensor, deviations_B: torch.Tensor, values_BQ: torch.Tensor
) -> None:
    """Add to every row the Gaussian noise of its step's key and its hash, in place.

    It is drawn under the key that the hash's block of the step's stream begins with.
    """
    keys_B16 = integers(step_keys_B8, hashes_B4, 8).view(torch.int32)  # the key is the first 8 of the words
    rows, size = values_BQ.shape
    start = step_keys_B8.new_zeros(4)
    arguments = (keys_B16, start, deviations_B, values_BQ, values_BQ.stride(0), size)
    _gaussian_kernel[_grid(size, rows)](*arguments, LANES=_LANES)


def _grid(size: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(size, 8 * _LANES), rows
