"""FedProx (arXiv 1812.06127): a pull back to where the round began, so that unlike clients drift less.

factor    mu/2 * ||theta - anchor||^2 over the values of A and B. The same product B A has many factors, and
          this form tells them apart.
product   mu/2 * ||s (B A - B0 A0)||_F^2 over all matrices, what the adapter does to a layer: other factors of
          the same products are pulled alike (function space). With s the adapter's scale its gradient is

              dB = mu s^2 (B (A A^T) - B0 (A0 A^T))        dA = mu s^2 ((B^T B) A - (B^T B0) A0)

          from R x R products, never from a dense matrix.

The gradient joins that of the loss before the client's whole gradient is clipped, and after single examples
were clipped (DP-SGD): it depends on no example. The loss that a client reports is without it.
Tensor suffixes: C client, A client still at work, P flat adapter, R rank, I input feature, O output feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.lora.bank import factors_of
from fedllm.types import LocalTraining


@dataclass(frozen=True, eq=False)
class Pull:
    """What each row of a bank is pulled to, and how strongly in either space (0 = not at all)."""

    layout: AdapterLayout
    anchor_CP: torch.Tensor
    factor_C: torch.Tensor  # mu where the space is "factor"
    product_C: torch.Tensor  # mu s^2 where it is "product"

    def add_gradient(self, grad_AP: torch.Tensor, theta_AP: torch.Tensor) -> None:
        """Add the pull of the first A rows to their gradients, in place."""
        active = slice(0, len(grad_AP))
        anchor_AP = self.anchor_CP[active]
        if bool(self.factor_C[active].any()):
            grad_AP.add_((theta_AP - anchor_AP) * self.factor_C[active, None])
        if bool(self.product_C[active].any()):
            strength = self.product_C[active, None, None]
            for index in range(len(self.layout.matrices)):
                a_ARI, b_AOR = factors_of(self.layout, index, theta_AP)
                a0_ARI, b0_AOR = factors_of(self.layout, index, anchor_AP)
                grad_a_ARI, grad_b_AOR = factors_of(self.layout, index, grad_AP)
                b_product = b_AOR @ (a_ARI @ a_ARI.mT) - b0_AOR @ (a0_ARI @ a_ARI.mT)
                a_product = (b_AOR.mT @ b_AOR) @ a_ARI - (b_AOR.mT @ b0_AOR) @ a0_ARI
                grad_b_AOR.add_(b_product * strength)
                grad_a_ARI.add_(a_product * strength)


def pull_of(
    layout: AdapterLayout,
    anchor_CP: torch.Tensor,
    trainings: Sequence[LocalTraining],
    scales: Sequence[float],
) -> Pull | None:
    """Return the pull of every row, or None where no row has one."""
    if not any(training.proximal for training in trainings):
        return None
    factor = [t.proximal if t.proximal_space == "factor" else 0.0 for t in trainings]
    product = [
        t.proximal * scale**2 if t.proximal_space == "product" else 0.0
        for t, scale in zip(trainings, scales, strict=True)
    ]
    return Pull(layout, anchor_CP, anchor_CP.new_tensor(factor), anchor_CP.new_tensor(product))
