"""Factored algebra: sums of products B A without ever forming a dense [D_out, D_in] matrix.

A sum of K rank-R products is the product of stacked factors, so its norm and its singular value
decomposition follow from QR of two thin matrices and an SVD of a small core (FlexLoRA's read-out,
arXiv 2402.11505, computed as in the factored form of Golub & Van Loan, section 5.4).
Tensor suffixes: O output feature, I input feature, N stacked rank, R rank.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Product:
    """The matrix `left_ON @ right_NI`, kept as its two factors in float64."""

    left_ON: torch.Tensor
    right_NI: torch.Tensor

    @property
    def num_columns(self) -> int:
        """N, the number of stacked rank-one terms."""
        return self.left_ON.shape[1]


def zero_product(out_features: int, in_features: int) -> Product:
    """Return the empty sum: a zero matrix of N = 0 terms."""
    return Product(
        torch.zeros(out_features, 0, dtype=torch.float64), torch.zeros(0, in_features, dtype=torch.float64)
    )


def add_product(total: Product, b_OR: torch.Tensor, a_RI: torch.Tensor, weight: float) -> Product:
    """Return total + weight * B A, re-factored without loss once N exceeds the smaller dimension."""
    left = torch.cat([total.left_ON, weight * b_OR.double()], dim=1)
    right = torch.cat([total.right_NI, a_RI.double()], dim=0)
    product = Product(left, right)
    smaller = min(left.shape[0], right.shape[1])
    return _compress(product) if product.num_columns > 2 * smaller else product


def _compress(product: Product) -> Product:
    """Return the same matrix with at most min(D_out, D_in) stacked terms."""
    u_ON, s_N, v_NI = decompose(product)
    return Product(u_ON * s_N, v_NI)


def _cores(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Q_left, core, Q_right with left @ right = Q_left @ core @ Q_right^T."""
    q_left, r_left = torch.linalg.qr(product.left_ON)
    q_right, r_right = torch.linalg.qr(product.right_NI.T)
    return q_left, r_left @ r_right.T, q_right


def decompose(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the thin SVD (U [O, n], S [n] descending, V [n, I]) of the matrix, n = min(O, N, I)."""
    q_left, core, q_right = _cores(product)
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    return q_left @ u, s, v @ q_right.T


def norm(product: Product) -> float:
    """Return the Frobenius norm of the matrix."""
    return float(torch.linalg.norm(_cores(product)[1]))


def difference(product: Product, b_OR: torch.Tensor, a_RI: torch.Tensor) -> Product:
    """Return the matrix minus B A."""
    return add_product(product, b_OR, a_RI, -1.0)


def scale_product(product: Product, factor: float) -> Product:
    """Return factor times the matrix."""
    return Product(product.left_ON * factor, product.right_NI)


@dataclass(frozen=True, eq=False)
class Truncation:
    """The best rank-R approximation B A of a matrix, and the share of squared norm it keeps."""

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
    out_features, in_features = product.left_ON.shape[0], product.right_NI.shape[1]
    a_RI = fallback_a_RI.double().clone()
    b_OR = torch.zeros(out_features, rank, dtype=torch.float64)
    assert a_RI.shape == (rank, in_features)
    alive = int((s[:rank] > _relative_floor(s)).sum())
    root = s[:alive].sqrt()
    a_RI[:alive] = root[:, None] * v[:alive]
    b_OR[:, :alive] = u[:, :alive] * root
    return Truncation(a_RI, b_OR, float(energy[:rank].sum()), float(energy.sum()))


def _relative_floor(s: torch.Tensor) -> float:
    """Return the size below which a singular value is rounding noise of float32 factors."""
    return float(s[0]) * 1e-7 if s.numel() else 0.0
