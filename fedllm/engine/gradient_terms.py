"""Terms that federated optimization adds to a client's gradient: FedProx's pull and SCAFFOLD's correction.

FedProx (arXiv 1812.06127) pulls back to where the round began, so that unlike clients drift apart less.

factor    mu/2 * ||theta - anchor||^2 over the trained values of A and B. The same product B A has many
          factors, and this form tells them apart.
product   mu/2 * ||s (B A - B0 A0)||_F^2 over all matrices, what the adapter does to a layer: other factors of
          the same products are pulled alike (function space). With s the adapter's scale its gradient is

              dB = mu s^2 (B (A A^T) - B0 (A0 A^T))        dA = mu s^2 ((B^T B) A - (B^T B0) A0)

          from R x R products, never from a dense matrix.

SCAFFOLD (arXiv 1910.06378) adds c - c_i, the mean gradient of all clients less the client's own.
Both join before the client's whole gradient is clipped, and after single examples were clipped (DP-SGD): they
depend on no example. The loss that a client reports is without them.
Tensor suffixes: C client, A client still at work, P trained values, R rank, I input, O output feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.parts import part_of
from fedllm.engine.adapter_bank import Bank
from fedllm.messages import LocalTraining


@dataclass(frozen=True, eq=False)
class ProximalPull:
    """Where each row of a bank is pulled to, and how strongly in either space (0 = not at all)."""

    factors: tuple[float, ...]  # of each client: mu where the space is "factor"; on the host, as `products`
    factor_C: torch.Tensor
    anchor_CP: torch.Tensor
    products: tuple[float, ...]  # mu s^2 where it is "product"
    product_C: torch.Tensor
    anchor_factors: Sequence[tuple[torch.Tensor, torch.Tensor]]  # (A0 [C, R, I], B0 [C, O, R]) per matrix

    def add_gradient(self, bank: Bank, grad_AP: torch.Tensor) -> None:
        """Add the pull of the bank's first A rows to their gradients, in place."""
        active = slice(0, len(grad_AP))
        if any(self.factors[active]):
            moved_AP = bank.theta_CP[active] - self.anchor_CP[active]
            grad_AP.add_(moved_AP * self.factor_C[active, None])
        if any(self.products[active]):
            strength = self.product_C[active, None, None]
            for index, (a0_CRI, b0_COR) in enumerate(self.anchor_factors):
                a_ARI, b_AOR = (factor[active] for factor in bank.factors(index))
                a0_ARI, b0_AOR = a0_CRI[active], b0_COR[active]
                grad_a_ARI, grad_b_AOR = bank.gradients(index, grad_AP)
                if grad_b_AOR is not None:
                    change = b_AOR @ (a_ARI @ a_ARI.mT) - b0_AOR @ (a0_ARI @ a_ARI.mT)
                    grad_b_AOR.add_(change * strength)
                if grad_a_ARI is not None:
                    change = (b_AOR.mT @ b_AOR) @ a_ARI - (b_AOR.mT @ b0_AOR) @ a0_ARI
                    grad_a_ARI.add_(change * strength)


@dataclass(frozen=True, eq=False)
class ControlCorrection:
    """SCAFFOLD's c - c_i for each row [C, P], and the running sum of the gradients it is added to."""

    correction_CP: torch.Tensor
    clip_C1: torch.Tensor
    sum_CP: torch.Tensor

    def apply(self, grad_AP: torch.Tensor) -> None:
        """Count the gradients of the first A rows, and correct them in place."""
        active = slice(0, len(grad_AP))
        # Clipped like the step itself: one wild gradient would spoil the control variate for all rounds.
        norms = torch.linalg.vector_norm(grad_AP, dim=1, keepdim=True)
        factors = (self.clip_C1[active] / norms.clamp(min=1e-30)).clamp(max=1.0)  # a zero norm clips nothing
        self.sum_CP[active].add_(grad_AP * factors)
        grad_AP.add_(self.correction_CP[active])


def proximal_pull(
    bank: Bank, anchors: Sequence[torch.Tensor], trainings: Sequence[LocalTraining]
) -> ProximalPull | None:
    """Return the pull of every row of a loaded bank, or None where no row has one.

    `anchors` are whole vectors of the bank's layout.
    """
    if not any(training.proximal for training in trainings):
        return None
    pairs = [(t, t.proximal * scale**2) for t, scale in zip(trainings, bank.scales, strict=True)]
    factor = [t.proximal if t.proximal_space == "factor" else 0.0 for t in trainings]
    product = [strength if t.proximal_space == "product" else 0.0 for t, strength in pairs]
    parts = torch.stack([part_of(bank.layout, anchor, bank.trained) for anchor in anchors])
    # Products need the factor that is not trained too, so whole anchors are kept where any row wants them.
    wholes = torch.stack(list(anchors)).to(bank.theta_CP) if any(product) else None
    return ProximalPull(
        tuple(factor),
        bank.theta_CP.new_tensor(factor),
        parts.to(bank.theta_CP),
        tuple(product),
        bank.theta_CP.new_tensor(product),
        () if wholes is None else bank.layout.factors(wholes),
    )


def control_correction(
    corrections_CP: torch.Tensor | None, theta_CP: torch.Tensor, trainings: Sequence[LocalTraining]
) -> ControlCorrection | None:
    """Return a round's corrections for the rows `theta_CP`, if there are any; clip norm 0 clips nothing."""
    if corrections_CP is None:
        return None
    clips = theta_CP.new_tensor([training.clip_norm or float("inf") for training in trainings])
    return ControlCorrection(corrections_CP.to(theta_CP), clips[:, None], torch.zeros_like(theta_CP))
