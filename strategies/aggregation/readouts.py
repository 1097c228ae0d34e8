"""Read-outs: from the mean of the clients' products to the factors of the next adapter.

With client factors (A_i, B_i), scales folded into B, normalised weights p_i, and the means A' = sum p_i A_i,
B' = sum p_i B_i, the mean a federation wants is M = sum p_i B_i A_i = B' A' + R. Its residual
R = sum p_i (B_i - B')(A_i - A') is what averaging factors loses.

    factor-mean  A', B'; loses R. Exact where one factor is common to all: FFA-LoRA (arXiv 2403.12313) and
                 RoLoRA (arXiv 2502.01755) by training one factor, FedIT (arXiv 2305.05644) not.
                 HetLoRA (arXiv 2401.06432) pads smaller ranks with zeros and weights by ||B_i A_i||_F
    svd          the best rank-R form of M, singular values split evenly (FlexLoRA, arXiv 2402.11505)
    projection   A' with the best B there is for it, M A'^T (A' A'^T)^-1: what LoRA-FAIR (arXiv 2411.14961)
                 approaches by gradient steps, in closed form
    residual     A', B', and the base gains R (FedEx-LoRA, arXiv 2410.09432); exact
    stack        a fresh adapter, and the base gains M (FLoRA, arXiv 2409.05976); exact
    local-b      A', and B as it was: every client keeps its own (FedSA-LoRA, arXiv 2410.01463). The server
                 never sees a B, so the global adapter's stays zero and adds nothing to the base model until
                 a client puts its own B next to the A

Tensor suffixes: L matrices of one shape, R rank, O output feature, I input feature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from fedllm.adapters.algebra import Product, inner, squared_norm, truncate
from strategies.aggregation.sums import MeanChange

LEAST_ROW = 1e-5  # directions of A' shorter than this share of the longest count as none: float32 has no more


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean M of some matrices of one shape: the factors the round started from, and their mean change."""

    start_LRI: torch.Tensor
    start_LOR: torch.Tensor
    change: MeanChange

    @cached_property
    def mean_LRI(self) -> torch.Tensor:
        """A'."""
        return self.start_LRI + self.change.a_LRI

    @cached_property
    def mean_LOR(self) -> torch.Tensor:
        """B'."""
        return self.start_LOR + self.change.b_LOR

    @cached_property
    def product(self) -> Product:
        """M."""
        return Product(self.mean_LOR, self.mean_LRI).plus(self.change.residual).lightest()

    @cached_property
    def energy_L(self) -> torch.Tensor:
        """||M||^2."""
        if self.change.residual.right is not None:
            return squared_norm(self.product)
        # ||B' A' + R||^2 by its three terms: a dense M is not formed for its norm alone.
        factors = Product(self.mean_LOR, self.mean_LRI)
        both = squared_norm(factors) + 2 * inner(factors, self.change.residual) + self.residual_energy_L
        return both.clamp(min=0)

    @cached_property
    def residual_energy_L(self) -> torch.Tensor:
        """||R||^2."""
        if self.change.residual.right is None or self.product.right is None:
            return squared_norm(self.change.residual)
        rank = self.mean_LRI.shape[1]  # R is the end of the stack M, whose Gram matrices are needed anyway
        left, right = self.product.grams
        return (left[:, rank:, rank:] * right[:, rank:, rank:]).sum(dim=(1, 2)).clamp(min=0)

    @cached_property
    def change_energy_L(self) -> torch.Tensor:
        """||M - B_0 A_0||^2, by terms as small as the change: B_0 (A' - A_0) + (B' - B_0) A' + R."""
        linear = Product(
            torch.cat([self.start_LOR, self.change.b_LOR], dim=2),
            torch.cat([self.change.a_LRI, self.mean_LRI], dim=1),
        )
        both = squared_norm(linear) + 2 * inner(linear, self.change.residual) + self.residual_energy_L
        return both.clamp(min=0)


@dataclass(frozen=True, eq=False)
class ReadOut:
    """The next factors, what the base model gains, and the energy of M that neither holds."""

    a_LRI: torch.Tensor
    b_LOR: torch.Tensor
    lost_L: torch.Tensor
    base: Product | None = None


def factor_mean(mean: Mean) -> ReadOut:
    """Return A' and B'."""
    return ReadOut(mean.mean_LRI, mean.mean_LOR, mean.residual_energy_L)


def svd(mean: Mean) -> ReadOut:
    """Return the balanced best rank-R form of M; directions that M lacks keep the start's A and a zero B."""
    best = truncate(mean.product, mean.start_LRI.shape[1], mean.start_LRI)
    return ReadOut(best.a_LRI, best.b_LOR, (mean.energy_L - best.kept_L).clamp(min=0))


def projection(mean: Mean) -> ReadOut:
    """Return A' and the best B for it, B' + R A'^+; of equally good ones that nearest to B'."""
    # M A'^+ = B' + R A'^+, by least squares; R alone, since B' A' A'^+ would only round B'.
    inverse_LIR = torch.linalg.pinv(mean.mean_LRI, rtol=LEAST_ROW)
    correction_LOR = mean.change.residual.times(inverse_LIR)
    gained_L = squared_norm(Product(correction_LOR, mean.mean_LRI))
    lost_L = (mean.residual_energy_L - gained_L).clamp(min=0)
    return ReadOut(mean.mean_LRI, mean.mean_LOR + correction_LOR, lost_L)


def residual(mean: Mean) -> ReadOut:
    """Return A' and B', and R for the base."""
    return ReadOut(mean.mean_LRI, mean.mean_LOR, torch.zeros_like(mean.energy_L), mean.change.residual)


def stack(mean: Mean) -> ReadOut:
    """Return the start's A with a zero B, and M for the base; the caller draws a fresh A."""
    return ReadOut(
        mean.start_LRI, torch.zeros_like(mean.start_LOR), torch.zeros_like(mean.energy_L), mean.product
    )


def local_b(mean: Mean) -> ReadOut:
    """Return A' and the start's B."""
    return ReadOut(mean.mean_LRI, mean.start_LOR, torch.zeros_like(mean.energy_L))


READ_OUTS: dict[str, Callable[[Mean], ReadOut]] = {
    "factor-mean": factor_mean,
    "svd": svd,
    "projection": projection,
    "residual": residual,
    "stack": stack,
    "local-b": local_b,
}
