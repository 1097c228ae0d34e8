"""Factored algebra: sums of products B A without ever forming a dense [D_out, D_in] matrix.

A sum of K rank-R products is one product of stacked factors, so its inner products follow from small Gram
matrices and its singular value decomposition from QR of two thin matrices and an SVD of a small core (the
read-out of FlexLoRA, arXiv 2402.11505, in factored form).
Tensor suffixes: O output feature, I input feature, N stacked rank, R rank.
"""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class Product:
    """The matrix sum_k weight_k * B_k A_k [O, I], kept as its terms (weight, B [O, R_k], A [R_k, I])."""

    out_features: int
    in_features: int
    terms: tuple[tuple[float, torch.Tensor, torch.Tensor], ...] = ()

    def plus(self, weight: float, b_OR: torch.Tensor, a_RI: torch.Tensor) -> "Product":
        """Return the sum with one more term; past twice the smaller dimension it is merged, without loss."""
        longer = Product(self.out_features, self.in_features, (*self.terms, (weight, b_OR, a_RI)))
        num_columns = sum(term[1].shape[1] for term in longer.terms)
        if num_columns <= 2 * min(self.out_features, self.in_features):
            return longer
        u_ON, s_N, v_NI = decompose(longer)
        return Product(self.out_features, self.in_features, ((1.0, u_ON * s_N, v_NI),))

    def times(self, factor: float) -> "Product":
        """Return factor times the matrix."""
        return Product(
            self.out_features, self.in_features, tuple((factor * w, b, a) for w, b, a in self.terms)
        )

    @cached_property
    def left_ON(self) -> torch.Tensor:
        """The stacked weighted B, in float64."""
        empty = torch.zeros(self.out_features, 0, dtype=torch.float64)
        return torch.cat([empty, *(weight * b_OR.double() for weight, b_OR, _ in self.terms)], dim=1)

    @cached_property
    def right_NI(self) -> torch.Tensor:
        """The stacked A, in float64."""
        empty = torch.zeros(0, self.in_features, dtype=torch.float64)
        return torch.cat([empty, *(a_RI.double() for _, _, a_RI in self.terms)], dim=0)


def inner(first: Product, second: Product) -> float:
    """Return the Frobenius inner product of two matrices, from N x N Gram matrices."""
    lefts = first.left_ON.T @ second.left_ON
    rights = first.right_NI @ second.right_NI.T
    return float((lefts * rights).sum())


def squared_distance(first: Product, second: Product) -> float:
    """Return ||first - second||_F^2; rounding of float64 leaves about 1e-16 of the larger squared norm."""
    return max(0.0, inner(first, first) - 2 * inner(first, second) + inner(second, second))


def decompose(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the thin SVD (U [O, n], S [n] descending, V [n, I]) of the matrix, n = min(O, N, I)."""
    q_left, r_left = torch.linalg.qr(product.left_ON)
    q_right, r_right = torch.linalg.qr(product.right_NI.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, v @ q_right.T


@dataclass(frozen=True, eq=False)
class Truncation:
    """The best rank-R approximation B A of a matrix, and how much of its squared norm it keeps."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    kept: float  # sum of the squares of the singular values kept
    total: float  # of all


def truncate(product: Product, rank: int, fallback_a_RI: torch.Tensor) -> Truncation:
    """Return the balanced rank-R read-out B = U sqrt(S), A = sqrt(S) V.

    A direction whose singular value vanishes would leave zeros in both factors, where no gradient reaches
    it ever again; there A takes the row of `fallback_a_RI` and B stays zero, as in a fresh adapter.
    """
    u, s, v = decompose(product)
    energy = s.square()
    a_RI = fallback_a_RI.double().clone()
    b_OR = torch.zeros(product.out_features, rank, dtype=torch.float64)
    alive = int((s[:rank] > rounding_floor(s)).sum())
    root = s[:alive].sqrt()
    a_RI[:alive] = root[:, None] * v[:alive]
    b_OR[:, :alive] = u[:, :alive] * root
    return Truncation(a_RI, b_OR, float(energy[:rank].sum()), float(energy.sum()))


def rounding_floor(s: torch.Tensor) -> float:
    """Return the size below which a singular value is rounding noise of float32 factors."""
    return float(s[0]) * 1e-7 if s.numel() else 0.0
