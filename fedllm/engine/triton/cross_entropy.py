"""Cross-entropy and its gradient in one Triton kernel; the twin is `fedllm.engine.head.CrossEntropy`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes every annotation of a kernel for its own.

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # logits that a program reads at a time


@triton.jit
def _cross_entropy_kernel(
    logits, targets, weights, losses, stride, size, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Take one token: two sweeps over its logits, of which the second turns them into their gradient."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    target = tl.load(targets + token)
    v = tl.arange(0, BLOCK)
    # Each lane keeps the largest logit it has seen, and the sum of exponentials relative to it.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        value = tl.load(row + first + v, mask=first + v < size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, value)
        # -inf less -inf is NaN; a lane that has seen nothing else counts 0.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.exp(value - shift)
        largest = larger
    top = tl.max(largest, 0)
    total *= tl.exp(largest - top)
    log_norm = top + tl.log(tl.sum(total, 0))
    tl.store(losses + token, log_norm - tl.load(row + target).to(tl.float32))
    if GRAD:
        tl.debug_barrier()  # all have read the target's logit before one overwrites it
        weight = tl.load(weights + token)
        for first in range(0, size, BLOCK):
            value = tl.load(row + first + v, mask=first + v < size, other=0.0).to(tl.float32)
            gradient = (tl.exp(value - log_norm) - tl.where(first + v == target, 1.0, 0.0)) * weight
            tl.store(row + first + v, gradient.to(logits.dtype.element_ty), mask=first + v < size)


def cross_entropy_(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor | None
) -> torch.Tensor:
    """Return -log p(target) of each token in float32, [N], in nats.

    With weights the logits are overwritten by the gradient of the sum of weights times losses.
    """
    losses_N = torch.empty(len(logits_NV), device=logits_NV.device)
    weights = losses_N if weights_N is None else weights_N
    _cross_entropy_kernel[(len(logits_NV),)](
        *(logits_NV, targets_N, weights, losses_N, logits_NV.stride(0), logits_NV.shape[1]),
        GRAD=weights_N is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return losses_N
