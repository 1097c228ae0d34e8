"""The sum of clipped gradients of examples: each is read once, and those that count as nothing not at all.

As a product of matrices ([A, S] with zeros, times [S, P]) it would also take 0 times the gradients of other
jobs, and 0 times NaN is NaN. Tensor suffixes: A job, S slot (one example), P trained value.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes every annotation of a kernel for its own.

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _clipped_sum_kernel(
    grads, grad_stride, factors, owners, slots, totals, total_stride, size, BLOCK: tl.constexpr
):
    job = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = place < size
    target = totals + job * total_stride + place
    total = tl.load(target, mask=is_inside, other=0.0)
    source = grads + place
    for slot in range(slots):
        factor = tl.load(factors + slot)
        # A NaN is not 0, so a job that diverges as a whole still shows.
        is_taken = is_inside & ((tl.load(owners + slot) == job) & (factor != 0.0))
        total = tl.where(is_taken, total + factor * tl.load(source, mask=is_taken, other=0.0), total)
        source += grad_stride
    tl.store(target, total, mask=is_inside)


def add_clipped_sum(
    totals_AP: torch.Tensor, grads_SP: torch.Tensor, factors_S: torch.Tensor, owners_S: torch.Tensor
) -> None:
    """Add to every job's row its own slots' gradients, each times its factor; in place."""
    jobs, size = totals_AP.shape
    arguments = (grads_SP, grads_SP.stride(0), factors_S, owners_S, len(grads_SP))
    _clipped_sum_kernel[triton.cdiv(size, _BLOCK), jobs](
        *arguments, totals_AP, totals_AP.stride(0), size, BLOCK=_BLOCK
    )
