"""AdamW over rows: one client a row, a dozen kernels a step for any number of clients and layers, or one."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from fedllm.engine.device_trial import stands_trial
from fedllm.engine.row_step import BETA1, BETA2, RowStep, plain_adamw
from fedllm.messages import LocalTraining


class RowAdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) on parameters [C, P], each row by its own numbers.

    State is fresh for every client and round. Rows are stepped as a prefix: clients that have finished come
    last and are left exactly as they are. All stepped rows have taken the same number of steps. Where
    `movable_CP` is given and false, a value keeps its bits, and its gradient counts for no norm.
    """

    def __init__(
        self,
        theta_CP: torch.Tensor,
        trainings: Sequence[LocalTraining],
        movable_CP: torch.Tensor | None = None,
    ):
        self.theta_CP = theta_CP
        self.mean_CP = torch.zeros_like(theta_CP)
        self.square_CP = torch.zeros_like(theta_CP)
        self.num_steps = 0

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, device=theta_CP.device, dtype=theta_CP.dtype)[:, None]

        self.rate_C1 = column([training.learning_rate for training in trainings])
        # Decoupled weight decay: theta shrinks by this factor before each step.
        keep_C1 = column([1 - t.learning_rate * t.weight_decay for t in trainings])
        movable_CP = None if movable_CP is None else movable_CP.to(theta_CP.device)
        self.movable_CP = movable_CP
        self.keep_CP = keep_C1 if movable_CP is None else torch.where(movable_CP, keep_C1, 1.0)
        self.clip_C1 = column([training.clip_norm or float("inf") for training in trainings])
        self._update = plain_adamw
        if theta_CP.dtype == torch.float32 and _is_fused(theta_CP.device):
            from fedllm.engine.triton.adamw import adamw_rows

            self._update = adamw_rows

    def step(self, grad_AP: torch.Tensor) -> None:
        """Update the first A rows with their gradients [A, P], each row's norm clipped; uses them up."""
        active = slice(0, len(grad_AP))
        if self.movable_CP is not None:
            grad_AP.masked_fill_(~self.movable_CP[active], 0.0)
        norms_A1 = torch.linalg.vector_norm(grad_AP, dim=1, keepdim=True)
        self.num_steps += 1
        self._update(
            RowStep(
                self.theta_CP[active],
                grad_AP,
                self.mean_CP[active],
                self.square_CP[active],
                (self.clip_C1[active] / (norms_A1 + 1e-6)).clamp_(max=1.0),  # as torch's clip_grad_norm_
                self.rate_C1[active],
                self.keep_CP[active],
                # Both moments start at zero, so the first steps would be too short without these.
                1 - BETA1**self.num_steps,
                1 - BETA2**self.num_steps,
            )
        )


@lru_cache(maxsize=8)
def _is_fused(device: torch.device) -> bool:
    """Return whether the kernel of a step is right on a device, tried once."""

    def trial() -> bool:
        from fedllm.engine.triton.adamw import adamw_rows

        def stepped(update: Callable[[RowStep], None]) -> torch.Tensor:
            values = torch.linspace(0.1, 1, 12, device=device).view(4, 1, 3)
            theta, grad, mean, square = values
            half = torch.full((1, 1), 0.5, device=device)
            update(RowStep(theta, grad, mean, square, half, half, half, 0.1, 0.001))
            return values[[0, 2, 3]]

        return torch.allclose(stepped(adamw_rows), stepped(plain_adamw), rtol=1e-5)

    return device.type == "cuda" and stands_trial(device, "AdamW", trial)


def largest_move(training: LocalTraining, largest_start: float) -> float:
    """Return the furthest any value can honestly move in a client's local steps.

    AdamW's step t is at most learning_rate * sqrt(sum_i w_i^2 / u_i), where w and u are the normalised
    weights of the first and second moment (Cauchy-Schwarz; 1 at t = 1, 7.3 as t grows). Weight decay adds at
    most its share of the largest value there is. Clipping does not matter: the step has no scale of its own.
    """
    reach = training.learning_rate * sum(_step_bound(t) for t in range(1, training.steps + 1))
    decayed = min(1.0, training.steps * training.learning_rate * training.weight_decay)
    return reach + decayed * (largest_start + reach)


def _step_bound(t: int) -> float:
    """Return sqrt(sum_i w_i^2 / u_i), with w_i ~ BETA1^(t-i) and u_i ~ BETA2^(t-i), each summing to 1."""
    # The sum over i is geometric, of this ratio.
    ratio = BETA1**2 / BETA2
    first = ((1 - BETA1) / (1 - BETA1**t)) ** 2
    second = (1 - BETA2**t) / (1 - BETA2)
    return math.sqrt(first * second * (1 - ratio**t) / (1 - ratio))
