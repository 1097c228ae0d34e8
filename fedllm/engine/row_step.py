"""One step of AdamW (Loshchilov & Hutter, arXiv 1711.05101) on rows of parameters, in torch.

The same in one kernel: `fedllm.engine.triton.adamw`. Tensor suffixes: A row, P value of a row.
"""

from dataclasses import dataclass

import torch

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True, eq=False)
class RowStep:
    """One step of A rows, each by its own numbers. Suffix 1: one number a row."""

    theta_AP: torch.Tensor
    grad_AP: torch.Tensor
    mean_AP: torch.Tensor
    square_AP: torch.Tensor
    factor_A1: torch.Tensor  # clips the gradient
    rate_A1: torch.Tensor
    keep_AP: torch.Tensor  # what weight decay leaves of each value; [A, 1] where all of a row keep the same
    correction1: float  # of the mean's start at zero
    correction2: float  # of the square's


def plain_adamw(step: RowStep) -> None:
    """Change theta and both moments in place; the gradients are clipped in place."""
    grad, mean, square = step.grad_AP.mul_(step.factor_A1), step.mean_AP, step.square_AP
    mean.lerp_(grad, 1 - BETA1)
    square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    denominator = square.sqrt().div_(step.correction2**0.5).add_(EPSILON)
    step.theta_AP.mul_(step.keep_AP)
    step.theta_AP.addcdiv_(mean * (-step.rate_A1 / step.correction1), denominator)
