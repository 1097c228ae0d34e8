"""One step of AdamW over rows in one Triton kernel; the twin is `fedllm.engine.row_step.plain_adamw`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes every annotation of a kernel for its own.

import triton
import triton.language as tl

from fedllm.engine.row_step import BETA1, BETA2, EPSILON, RowStep

_BLOCK = 2048  # values that a program takes


@triton.jit
def _adamw_kernel(
    theta, grad, mean, square, factors, rates, keep, stride_row, stride_grad, size, correction1, root2,
    KEEP_EACH: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    at = row * stride_row + place
    g = tl.load(grad + row * stride_grad + place, mask=inside, other=0.0) * tl.load(factors + row)
    m = tl.load(mean + at, mask=inside, other=0.0)
    m += (g - m) * (1 - BETA1)
    v = tl.load(square + at, mask=inside, other=0.0) * BETA2 + g * g * (1 - BETA2)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    moved = tl.load(theta + at, mask=inside, other=0.0)
    if KEEP_EACH:
        moved *= tl.load(keep + at, mask=inside, other=0.0)
    else:
        moved *= tl.load(keep + row)
    moved -= tl.load(rates + row) / correction1 * m / (tl.sqrt(v) / root2 + EPSILON)
    tl.store(theta + at, moved, mask=inside)


def adamw_rows(step: RowStep) -> None:
    """Do what `plain_adamw` does, within rounding; the gradients stay as they are."""
    theta, grad = step.theta_AP, step.grad_AP
    _adamw_kernel[triton.cdiv(theta.shape[1], _BLOCK), len(theta)](
        *(theta, grad, step.mean_AP, step.square_AP, step.factor_A1, step.rate_A1, step.keep_AP),
        *(theta.stride(0), grad.stride(0), theta.shape[1], step.correction1, step.correction2**0.5),
        KEEP_EACH=step.keep_AP.shape == theta.shape,
        BETA1=BETA1, BETA2=BETA2, EPSILON=EPSILON, BLOCK=_BLOCK,
    )  # fmt: skip
