"""SCAFFOLD (arXiv 1910.06378), experimental: control variates against the drift of unlike clients.

The server holds c, every client its own c_i, with c = sum of the c_i / N. A local step follows g - c_i + c in
place of the client's gradient g. Afterwards option II of the paper sets c_i to

    c_i - c + (theta_before - theta_after) / (K * learning rate)

over K steps, which for plain gradient steps is the mean of the K gradients g. That mean is what is kept here:
for SGD the same number, and still a gradient where the optimizer is not SGD. Each g counts clipped to the
client's clip norm, so no c_i is longer than that, which bounds what one client can do to c.

What it means under AdamW, which this engine has: the correction enters before Adam's moments, so Adam
rescales it with the gradient, value by value. The paper's analysis is of SGD and says nothing of that; no
faster convergence is promised. An adapter's factors must keep their basis from round to round (factor means).
Tensor suffixes: C client, A client still at work, P flat adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.types import LocalTraining


@dataclass(frozen=True, eq=False)
class Correction:
    """What is added to each row's gradients, c - c_i [C, P], and the running sum of the gradients."""

    correction_CP: torch.Tensor
    clip_C1: torch.Tensor
    sum_CP: torch.Tensor

    def apply(self, grad_AP: torch.Tensor) -> None:
        """Count the gradients of the first A rows, and correct them in place."""
        active = slice(0, len(grad_AP))
        norms = torch.linalg.vector_norm(grad_AP, dim=1, keepdim=True)
        factors = (self.clip_C1[active] / norms.clamp(min=1e-30)).clamp(max=1.0)
        self.sum_CP[active].add_(grad_AP * factors)
        grad_AP.add_(self.correction_CP[active])


def correction_of(
    corrections_CP: torch.Tensor | None, theta_CP: torch.Tensor, trainings: Sequence[LocalTraining]
) -> Correction | None:
    """Return the corrections of a round beside `theta_CP`, where there are any; clip norm 0 clips nothing."""
    if corrections_CP is None:
        return None
    clips = theta_CP.new_tensor([training.clip_norm or float("inf") for training in trainings])
    return Correction(corrections_CP.to(theta_CP), clips[:, None], torch.zeros_like(theta_CP))
