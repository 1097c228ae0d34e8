import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.algebra import Product, decompose, inner, squared_distance, truncate

laws = settings(deadline=None, max_examples=60)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product_of(terms: list[tuple[float, int]], num_out: int, num_in: int, seed: int) -> Product:
    """Return a sum of random terms (weight, rank), built one by one as a server does."""
    product = Product(num_out, num_in)
    for index, (weight, rank) in enumerate(terms):
        b_OR = gaussian(num_out, rank, seed=seed + 2 * index)
        a_RI = gaussian(rank, num_in, seed=seed + 2 * index + 1)
        product = product.plus(weight, b_OR, a_RI)
    return product


def dense_of(terms: list[tuple[float, int]], num_out: int, num_in: int, seed: int) -> torch.Tensor:
    """Return the same sum as an ordinary matrix."""
    dense = torch.zeros(num_out, num_in, dtype=torch.float64)
    for index, (weight, rank) in enumerate(terms):
        b_OR = gaussian(num_out, rank, seed=seed + 2 * index).double()
        a_RI = gaussian(rank, num_in, seed=seed + 2 * index + 1).double()
        dense += weight * b_OR @ a_RI
    return dense


weights = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3)
term_lists = st.lists(st.tuples(weights, st.integers(1, 3)), min_size=1, max_size=12)
sides = st.integers(1, 9)
seeds = st.integers(0, 2**20)


@laws
@given(term_lists, sides, sides, seeds)
def test_the_stacked_factors_multiply_to_the_dense_sum(terms, num_out, num_in, seed) -> None:
    product, dense = product_of(terms, num_out, num_in, seed), dense_of(terms, num_out, num_in, seed)
    torch.testing.assert_close(product.left_ON @ product.right_NI, dense, rtol=1e-11, atol=1e-11)
    half = product.times(0.5)
    torch.testing.assert_close(half.left_ON @ half.right_NI, dense / 2, rtol=1e-11, atol=1e-11)


@laws
@given(term_lists, term_lists, sides, sides, seeds)
def test_inner_products_and_distances_equal_the_dense_ones(first, second, num_out, num_in, seed) -> None:
    p, q = product_of(first, num_out, num_in, seed), product_of(second, num_out, num_in, seed + 99)
    a, b = dense_of(first, num_out, num_in, seed), dense_of(second, num_out, num_in, seed + 99)
    scale = float(a.square().sum() + b.square().sum())
    assert inner(p, q) == pytest.approx(float((a * b).sum()), abs=1e-12 * scale)
    assert squared_distance(p, q) == pytest.approx(float((a - b).square().sum()), abs=1e-12 * scale)
    assert squared_distance(p, p) <= 1e-12 * scale


@laws
@given(term_lists, sides, sides, seeds)
def test_decompose_is_the_thin_svd_of_the_dense_sum(terms, num_out, num_in, seed) -> None:
    product, dense = product_of(terms, num_out, num_in, seed), dense_of(terms, num_out, num_in, seed)
    u, s, v = decompose(product)
    number = min(num_out, num_in, product.left_ON.shape[1])
    assert (u.shape, s.shape, v.shape) == ((num_out, number), (number,), (number, num_in))
    expected = torch.linalg.svdvals(dense)
    atol = 1e-12 * (1 + float(expected[0]))
    torch.testing.assert_close(s, expected[:number], rtol=0, atol=atol)
    assert float(expected[number:].sum()) <= atol
    torch.testing.assert_close(u * s @ v, dense, rtol=0, atol=10 * atol)
    identity = torch.eye(number, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(v @ v.T, identity, rtol=0, atol=1e-12)


@laws
@given(term_lists, sides, sides, st.integers(1, 6), seeds)
def test_truncate_is_the_best_approximation_of_its_rank(terms, num_out, num_in, rank, seed) -> None:
    product, dense = product_of(terms, num_out, num_in, seed), dense_of(terms, num_out, num_in, seed)
    cut = truncate(product, rank, gaussian(rank, num_in, seed=7))
    energy = torch.linalg.svdvals(dense).square()
    error = float((dense - cut.b_OR @ cut.a_RI).square().sum())
    scale = float(energy.sum())
    # by Eckart-Young no matrix of this rank is nearer than the root of the energy left out
    assert error == pytest.approx(float(energy[rank:].sum()), abs=1e-10 * scale)
    assert cut.kept == pytest.approx(float(energy[:rank].sum()), rel=1e-10)
    assert cut.total == pytest.approx(scale, rel=1e-10)
    assert cut.a_RI.shape == (rank, num_in)
    assert cut.b_OR.shape == (num_out, rank)


def test_truncate_splits_every_singular_value_evenly() -> None:
    product = product_of([(1.0, 2), (0.5, 2)], 7, 5, 3)
    cut = truncate(product, 3, torch.zeros(3, 5))
    values = torch.linalg.svdvals(product.left_ON @ product.right_NI)[:3]
    torch.testing.assert_close(cut.b_OR.square().sum(dim=0), values)
    torch.testing.assert_close(cut.a_RI.square().sum(dim=1), values)


@pytest.mark.parametrize(("num_out", "num_in"), [(6, 4), (4, 6), (3, 50), (50, 3)])
def test_a_long_sum_is_merged_without_loss_and_stays_small(num_out: int, num_in: int) -> None:
    terms = [(1.0 + index / 7, 2) for index in range(40)]
    product, dense = product_of(terms, num_out, num_in, 1), dense_of(terms, num_out, num_in, 1)
    assert product.left_ON.shape[1] <= 2 * min(num_out, num_in)
    torch.testing.assert_close(product.left_ON @ product.right_NI, dense, rtol=1e-12, atol=1e-12)


def test_dead_directions_fall_back_to_a_start_that_can_still_learn() -> None:
    fallback = gaussian(4, 5, seed=9)
    product = Product(6, 5).plus(2.0, gaussian(6, 1, seed=1), gaussian(1, 5, seed=2))
    cut = truncate(product, 4, fallback)
    dense = product.left_ON @ product.right_NI
    torch.testing.assert_close(cut.b_OR @ cut.a_RI, dense, rtol=1e-12, atol=1e-12)
    assert torch.equal(cut.a_RI[1:], fallback[1:].double())
    assert int(cut.b_OR[:, 1:].count_nonzero()) == 0


@pytest.mark.parametrize(
    "product",
    [Product(6, 5), Product(6, 5).plus(1.0, torch.zeros(6, 2), gaussian(2, 5))],
    ids=["no term", "zero term"],
)
def test_a_zero_matrix_is_read_out_as_a_fresh_adapter(product: Product) -> None:
    fallback = gaussian(3, 5, seed=9)
    cut = truncate(product, 3, fallback)
    assert torch.equal(cut.a_RI, fallback.double())
    assert int(cut.b_OR.count_nonzero()) == 0
    assert cut.kept == cut.total == 0
    assert inner(product, product) == 0


def test_opposite_terms_cancel() -> None:
    b_OR, a_RI = gaussian(6, 2, seed=1), gaussian(2, 5, seed=2)
    product = Product(6, 5).plus(1.5, b_OR, a_RI).plus(-1.5, b_OR, a_RI)
    assert squared_distance(product, Product(6, 5)) < 1e-28
