"""FedProx (arXiv 1812.06127): a pull back to where the round began, so that unlike clients base delta less.

factor    mu/2 * ||theta - anchor||^2 over the trained values of A and B. The same product B A has many
          factors, and this form tells them apart.
product   mu/2 * ||s (B A - B0 A0)||_F^2 over all matrices, what the adapter does to a layer: other factors of
          the same products are pulled alike (function space). With s the adapter's scale its gradient is

              dB = mu s^2 (B (A A^T) - B0 (A0 A^T))        dA = mu s^2 ((B^T B) A - (B^T B0) A0)

          from R x R products, never from a dense matrix.

The gradient joins that of the loss before the client's whole gradient is clipped, and after single examples
were clipped (DP-SGD): it depends on no example. The loss that a client reports is without it.
Tensor suffixes: C client, A client still at work, P trained values, R rank, I input, O output feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.parts import part_of
from fedllm.engine.adapter_bank import Bank
from fedllm.messages import LocalTraining


@dataclass(frozen=True, eq=False)
class Pull:
    """What each row of a bank is pulled to, and how strongly in either space (0 = not at all)."""

    factor_C: torch.Tensor  # mu where the space is "factor"
    anchor_CP: torch.Tensor
    product_C: torch.Tensor  # mu s^2 where it is "product"
    anchor_pairs: tuple[
        tuple[torch.Tensor, torch.Tensor], ...
    ]  # (A0 [C, R, I], B0 [C, O, R]) of every matrix

    def add_gradient(self, bank: Bank, grad_AP: torch.Tensor) -> None:
        """Add the pull of the bank's first A rows to their gradients, in place."""
        active = slice(0, len(grad_AP))
        if bool(self.factor_C[active].any()):
            moved_AP = bank.theta_CP[active] - self.anchor_CP[active]
            grad_AP.add_(moved_AP * self.factor_C[active, None])
        if bool(self.product_C[active].any()):
            strength = self.product_C[active, None, None]
            for index, (a0_CRI, b0_COR) in enumerate(self.anchor_pairs):
                a_ARI, b_AOR = (factor[active] for factor in bank.factors(index))
                a0_ARI, b0_AOR = a0_CRI[active], b0_COR[active]
                grad_a_ARI, grad_b_AOR = bank.gradients(index, grad_AP)
                if grad_b_AOR is not None:
                    change = b_AOR @ (a_ARI @ a_ARI.mT) - b0_AOR @ (a0_ARI @ a_ARI.mT)
                    grad_b_AOR.add_(change * strength)
                if grad_a_ARI is not None:
                    change = (b_AOR.mT @ b_AOR) @ a_ARI - (b_AOR.mT @ b0_AOR) @ a0_ARI
                    grad_a_ARI.add_(change * strength)


def pull_of(bank: Bank, anchors: Sequence[torch.Tensor], trainings: Sequence[LocalTraining]) -> Pull | None:
    """Return the pull of every row of a loaded bank, or None where no row has one.

    `anchors` are whole vectors of the bank's layout.
    """
    if not any(training.proximal for training in trainings):
        return None
    pairs = [(t, t.proximal * scale**2) for t, scale in zip(trainings, bank.scales, strict=True)]
    factor = [t.proximal if t.proximal_space == "factor" else 0.0 for t in trainings]
    product = [strength if t.proximal_space == "product" else 0.0 for t, strength in pairs]
    parts = torch.stack([part_of(bank.layout, anchor, bank.trained) for anchor in anchors])
    return Pull(
        bank.theta_CP.new_tensor(factor),
        parts.to(bank.theta_CP),
        bank.theta_CP.new_tensor(product),
        _factor_pairs(bank.layout, torch.stack(list(anchors)).to(bank.theta_CP)) if any(product) else (),
    )


def _factor_pairs(layout: AdapterLayout, rows: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Return (A [n, R, I], B [n, O, R]) of every matrix as views of whole vectors [n, P]."""
    views = [
        rows[:, spec.offset : spec.offset + spec.size].view(len(rows), *spec.shape) for spec in layout.tensors
    ]
    return tuple(zip(views[0::2], views[1::2], strict=True))


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
