"""Norms, sums and rank-R approximations of products left @ right, many of one shape at once, in float64.

A sum of K rank-R products is one product of stacked factors. So norms and inner products follow from N x N
Gram matrices, and the best rank-R approximation (the read-out of FlexLoRA, arXiv 2402.11505) from a basis of
the leading left singular vectors. A dense [O, I] matrix is formed only where the stack has grown so wide
that the matrix is the smaller of the two.
Tensor suffixes: L matrices of one shape, O output, I input feature, N stacked rank, R rank, C columns.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

# What an eigendecomposition of an n x n matrix costs, in n^3 FLOP of a matrix product (float64 on a CPU).
EIGH_FLOP = 20
# Passes over the matrix that the range finder is expected to need, and those after which it stops.
USUAL_PASSES, MOST_PASSES = 5, 60
# It stops once a pass adds less than this share to the energy it keeps.
TOLERANCE = 1e-12
# Added to the diagonal of a Gram matrix, as a share of its trace: without it one of low rank has no Cholesky.
JITTER = 1e-13


@dataclass(frozen=True, eq=False)
class Product:
    """L matrices [O, I]: left [L, O, N] @ right [L, N, I]; without `right`, left [L, O, I] is the matrix."""

    left: torch.Tensor
    right: torch.Tensor | None = None

    @property
    def num_out(self) -> int:
        """O."""
        return self.left.shape[1]

    @property
    def num_in(self) -> int:
        """I."""
        return (self.left if self.right is None else self.right).shape[2]

    @cached_property
    def dense(self) -> torch.Tensor:
        """The matrices themselves, [L, O, I]."""
        return self.left if self.right is None else self.left @ self.right

    @cached_property
    def grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(left^T left, right right^T), each [L, N, N], of matrices that are kept as factors."""
        assert self.right is not None
        return self.left.mT @ self.left, self.right @ self.right.mT

    def times(self, x_LIC: torch.Tensor) -> torch.Tensor:
        """Return the matrices times x, [L, O, C]."""
        inner_LNC = x_LIC if self.right is None else _tall_times(self.right, x_LIC)
        return _tall_times(self.left, inner_LNC)

    def transposed_times(self, x_LOC: torch.Tensor) -> torch.Tensor:
        """Return the transposed matrices times x, [L, I, C]."""
        inner_LNC = _tall_times(self.left.mT, x_LOC)
        return inner_LNC if self.right is None else _tall_times(self.right.mT, inner_LNC)

    def plus(self, other: "Product") -> "Product":
        """Return the sum: the factors side by side, or one matrix where either has none."""
        if self.right is None or other.right is None:
            return Product(self.dense + other.dense)
        return Product(torch.cat([self.left, other.left], dim=2), torch.cat([self.right, other.right], dim=1))

    def split(self) -> list["Product"]:
        """Return the L matrices one by one, each a product of L = 1."""
        lefts = torch.split(self.left, 1)
        rights = [None] * len(lefts) if self.right is None else torch.split(self.right, 1)
        return [Product(left, right) for left, right in zip(lefts, rights, strict=True)]

    def cpu(self) -> "Product":
        """Return the same matrices on the CPU."""
        return Product(self.left.cpu(), None if self.right is None else self.right.cpu())

    def lightest(self) -> "Product":
        """Return the same matrices in the form that holds fewer numbers, factors or matrix."""
        if self.right is None:
            return self
        width, num_out, num_in = self.left.shape[2], self.num_out, self.num_in
        return self if width * (num_out + num_in) <= num_out * num_in else Product(self.dense)


def _tall_times(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return matrix @ x for an x of few columns; as rows the same product is up to 20 times faster."""
    return (x.mT @ matrix.mT).mT


def inner(first: Product, second: Product) -> torch.Tensor:
    """Return the Frobenius inner products [L]."""
    if first.right is None and second.right is None:
        return (first.left * second.left).sum(dim=(1, 2))
    if first.right is None:
        return inner(second, first)
    if second.right is None:
        return ((first.left.mT @ second.left) * first.right).sum(dim=(1, 2))
    # <L1 R1, L2 R2> = tr(R1^T L1^T L2 R2), the sum of the entries of (L1^T L2) * (R1 R2^T).
    return ((first.left.mT @ second.left) * (first.right @ second.right.mT)).sum(dim=(1, 2))


def squared_norm(product: Product) -> torch.Tensor:
    """Return ||.||_F^2 [L]; rounding leaves about 1e-16 of the largest squares that cancel within it."""
    if product.right is None:
        norms_L: torch.Tensor = torch.linalg.vector_norm(product.left, dim=(1, 2))
        return norms_L.square()
    left, right = product.grams
    return (left * right).sum(dim=(1, 2)).clamp(min=0)  # rounding may take a vanishing norm below zero


def decompose(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the thin SVD (U [L, O, n], S [L, n] descending, V [L, n, I]), n = min(O, N, I).

    By QR of both factors and an SVD of the core: every direction is found, to 1e-15 of the largest S.
    """
    if product.right is None:
        u, s, v = torch.linalg.svd(product.left, full_matrices=False)
        return u, s, v
    q_left, r_left = torch.linalg.qr(product.left)
    q_right, r_right = torch.linalg.qr(product.right.mT)
    u, s, v = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return q_left @ u, s, v @ q_right.mT


@dataclass(frozen=True, eq=False)
class Truncation:
    """The best rank-R approximation B A of each matrix, and how much of its squared norm it keeps."""

    a_LRI: torch.Tensor
    b_LOR: torch.Tensor
    kept_L: torch.Tensor  # sum of the squares of the singular values kept
    total_L: torch.Tensor  # of all


def truncate(product: Product, rank: int, fallback_LRI: torch.Tensor) -> Truncation:
    """Return the balanced rank-R read-out B = U sqrt(S), A = sqrt(S) V.

    A basis of the leading left singular vectors comes from the cheapest of three ways (`leading_basis`). The
    projection of the matrix on that basis is read out, decomposed by QR, so an error of the basis can lose
    energy but never invent any. Gram matrices square the condition; measured against the dense SVD on
    spectra from nearly flat to 1e-7 and in random bases, B A is within 1e-6 of it (as a share of ||M||),
    which is the rounding of float32, and the squared distance to M is the least there is to 1e-12 of ||M||^2.

    A direction whose singular value vanishes would leave zeros in both factors, where no gradient reaches
    it ever again; there A takes the row of `fallback_LRI` and B stays zero, as in a fresh adapter.
    """
    light = product.lightest()
    basis_LOC = leading_basis(light, rank, fallback_LRI)
    q_LIC, r_LCC = torch.linalg.qr(light.transposed_times(basis_LOC))
    u_LCC, s_LC, v_LCC = torch.linalg.svd(r_LCC.mT)
    number = min(rank, s_LC.shape[1])
    root_LC = s_LC[:, :number].sqrt()
    alive_LC = s_LC[:, :number] > rounding_floor(s_LC)
    a_LRI = fallback_LRI.double().clone()
    b_LOR = a_LRI.new_zeros(len(a_LRI), product.num_out, rank)
    rows_LCI = root_LC[:, :, None] * (v_LCC[:, :number] @ q_LIC.mT)
    columns_LOC = (basis_LOC @ u_LCC[:, :, :number]) * root_LC[:, None, :]
    a_LRI[:, :number] = torch.where(alive_LC[:, :, None], rows_LCI, a_LRI[:, :number])
    b_LOR[:, :, :number] = torch.where(alive_LC[:, None, :], columns_LOC, 0.0)
    return Truncation(a_LRI, b_LOR, s_LC[:, :number].square().sum(dim=1), squared_norm(light))


def rounding_floor(s_LC: torch.Tensor) -> torch.Tensor:
    """Return the sizes [L, 1] below which a singular value is rounding noise: factors travel as float32."""
    return s_LC[:, :1] * 1e-7


def leading_basis(product: Product, rank: int, guess_LRI: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis [L, O, C], C >= min(rank, N, O, I), that holds the leading left directions.

    Small stacks and small matrices go through one eigendecomposition; large ones through the range finder,
    whose passes cost less. Both counts are in FLOP, beyond the Gram matrices that a norm needs anyway.
    """
    num_out, num_in, columns = product.num_out, product.num_in, _num_columns(product, rank)
    if product.right is not None:
        width = product.left.shape[2]
        size, exact = width * (num_out + num_in), (EIGH_FLOP + 4) * width**3
        decomposed = _from_grams
    else:
        small, large = sorted((num_out, num_in))
        size, exact = num_out * num_in, EIGH_FLOP * small**3 + 2 * small**2 * large
        decomposed = _from_matrix
    passes = USUAL_PASSES * (4 * columns * size + 8 * (num_out + num_in) * columns**2)
    if exact <= passes:
        return decomposed(product, rank)
    return find_range(product, rank, guess_LRI)


def _num_columns(product: Product, rank: int) -> int:
    """Return the columns of the range finder: what lies beyond the rank speeds it up."""
    return min(2 * rank + 8, product.num_out, product.num_in)


def _from_grams(product: Product, rank: int) -> torch.Tensor:
    """Return the basis from the N x N Gram matrices: M M^T = left (right right^T) left^T.

    With right right^T = G G^T, the eigenvectors W of G^T (left^T left) G give left G W. Columns are first
    given equal norms left and right, or factors of uneven size could hide a direction behind the jitter.
    """
    left_LNN, right_LNN = product.grams
    diagonals = left_LNN.diagonal(dim1=1, dim2=2), right_LNN.diagonal(dim1=1, dim2=2)
    balance_LN = (diagonals[1] / diagonals[0]).pow(0.25)
    balance_LN = torch.where((balance_LN > 0) & balance_LN.isfinite(), balance_LN, 1.0)
    scales_LNN = balance_LN[:, :, None] * balance_LN[:, None, :]
    right_LNN = right_LNN / scales_LNN
    trace_L = right_LNN.diagonal(dim1=1, dim2=2).sum(dim=1)
    jitter_LN = (JITTER * trace_L + torch.finfo(torch.float64).tiny)[:, None].expand_as(balance_LN)
    root_LNN = torch.linalg.cholesky(right_LNN + torch.diag_embed(jitter_LN))
    core_LNN = root_LNN.mT @ (left_LNN * scales_LNN) @ root_LNN
    number = min(rank, product.left.shape[2], product.num_out, product.num_in)
    _, vectors_LNN = torch.linalg.eigh(core_LNN)  # eigenvalues ascend, so the leading ones come last
    turned_LNC = balance_LN[:, :, None] * (root_LNN @ vectors_LNN[:, :, core_LNN.shape[1] - number :])
    return _orthonormal(_tall_times(product.left, turned_LNC))


def _from_matrix(product: Product, rank: int) -> torch.Tensor:
    """Return the basis from the Gram matrix of the smaller side of dense matrices."""
    matrix = product.dense
    number = min(rank, *matrix.shape[1:])
    if product.num_out <= product.num_in:
        vectors_LOO: torch.Tensor = torch.linalg.eigh(matrix @ matrix.mT)[1]
        return vectors_LOO[:, :, product.num_out - number :].contiguous()
    vectors_LII: torch.Tensor = torch.linalg.eigh(matrix.mT @ matrix)[1]
    return _orthonormal(matrix @ vectors_LII[:, :, product.num_in - number :])


def _orthonormal(x_LOC: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the columns."""
    basis_LOC: torch.Tensor = torch.linalg.qr(x_LOC)[0]
    return basis_LOC


def find_range(product: Product, rank: int, guess_LRI: torch.Tensor) -> torch.Tensor:
    """Return the basis by subspace iteration from a guess of the row space (Halko et al., arXiv 0909.4061).

    The rest of the first block is drawn from a fixed seed. It stops when the energy of the leading `rank`
    directions no longer grows; with a width of at least the matrix's own rank one pass is exact.
    """
    number = _num_columns(product, rank)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(product.left), product.num_in, number, generator=generator, dtype=torch.float64)
    x_LIC = torch.cat([guess_LRI.double().mT, drawn], dim=2)[:, :, :number]
    kept_L = x_LIC.new_zeros(len(x_LIC))
    for _ in range(MOST_PASSES):
        basis_LOC = _orthonormal(product.times(x_LIC))
        x_LIC = product.transposed_times(basis_LOC)
        energy_L = torch.linalg.eigvalsh(x_LIC.mT @ x_LIC)[:, -rank:].sum(dim=1)
        if bool((energy_L - kept_L <= TOLERANCE * energy_L).all()):
            break
        kept_L = energy_L
    return basis_LOC
