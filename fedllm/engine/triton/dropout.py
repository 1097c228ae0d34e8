"""The dropout masks of all tokens of a pass in one kernel: Philox4x32-10, four features a count."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes every annotation of a kernel for its own.

import torch
import triton
import triton.language as tl

_BLOCK = 256  # counts of a program


@triton.jit
def _store(word, rate, scale, target, place, width):
    is_kept = (word >> 8).to(tl.float32) * 5.9604644775390625e-08 >= rate  # 24 bits times 2^-24
    value = tl.where(is_kept, scale, 0.0).to(target.dtype.element_ty)
    tl.store(target + place, value, mask=place < width)


@triton.jit
def _drop_mask_kernel(seeds, positions, rates, scales, masks, width, index, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    count = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    nothing = tl.zeros([BLOCK], tl.int32)
    position = nothing + tl.load(positions + token).to(tl.int32)
    first, second, third, fourth = tl.philox(
        tl.load(seeds + token), count, position, nothing + index, nothing
    )
    rate, scale, target = tl.load(rates + token), tl.load(scales + token), masks + token * width
    _store(first, rate, scale, target, 4 * count, width)
    _store(second, rate, scale, target, 4 * count + 1, width)
    _store(third, rate, scale, target, 4 * count + 2, width)
    _store(fourth, rate, scale, target, 4 * count + 3, width)


def drop_mask(
    seeds_T: torch.Tensor,
    positions_T: torch.Tensor,
    rates_T: torch.Tensor,
    index: int,
    like_TI: torch.Tensor,
) -> torch.Tensor:
    """Return what `counted_mask` of `fedllm.engine.dropout` does."""
    num_tokens, width = like_TI.shape
    mask_TI = torch.empty(num_tokens, width, device=like_TI.device, dtype=like_TI.dtype)
    # Here, since a kernel's division may round otherwise.
    scales_T = (1 / (1 - rates_T)).to(like_TI.dtype)
    _drop_mask_kernel[num_tokens, triton.cdiv(width, 4 * _BLOCK)](
        *(seeds_T, positions_T, rates_T, scales_T, mask_TI),
        *(width, index),
        BLOCK=_BLOCK,
    )
    return mask_TI
