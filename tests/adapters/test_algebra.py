import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters import algebra
from fedllm.adapters.algebra import (
    Product,
    decompose,
    find_range,
    inner,
    leading_basis,
    squared_norm,
    truncate,
)

laws = settings(deadline=None, max_examples=60)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product_of(ranks: list[int], num_out: int, num_in: int, seed: int, num: int = 2) -> Product:
    """Return `num` sums of random products of the given ranks, built one by one."""
    product = Product(torch.zeros(num, num_out, 0).double(), torch.zeros(num, 0, num_in).double())
    for index, rank in enumerate(ranks):
        left = gaussian(num, num_out, rank, seed=seed + 2 * index)
        right = gaussian(num, rank, num_in, seed=seed + 2 * index + 1)
        product = product.plus(Product(left, right))
    return product


def decaying(num_out: int, num_in: int, width: int, ratio: float) -> Product:
    """Return a matrix whose singular values fall by `ratio`, as factors in a random gauge."""
    left, _ = torch.linalg.qr(gaussian(1, num_out, width, seed=1))
    right, _ = torch.linalg.qr(gaussian(1, num_in, width, seed=2))
    gauge = gaussian(width, width, seed=3)
    scaled = left * ratio ** torch.arange(width).double()
    return Product(scaled @ torch.linalg.inv(gauge), gauge @ right.mT)


rank_lists = st.lists(st.integers(1, 3), max_size=8)
sides = st.integers(1, 9)
seeds = st.integers(0, 2**20)


@laws
@given(rank_lists, rank_lists, sides, sides, seeds, st.booleans(), st.booleans())
def test_norms_and_inner_products_equal_the_dense_ones(
    first, second, num_out, num_in, seed, first_dense, second_dense
) -> None:
    p, q = product_of(first, num_out, num_in, seed), product_of(second, num_out, num_in, seed + 99)
    a, b = p.dense, q.dense
    p, q = Product(a) if first_dense else p, Product(b) if second_dense else q
    scale = float(a.square().sum() + b.square().sum())
    torch.testing.assert_close(inner(p, q), (a * b).sum(dim=(1, 2)), rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(squared_norm(p), a.square().sum(dim=(1, 2)), rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(p.plus(q).dense, a + b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.lightest().dense, a)


@laws
@given(rank_lists, sides, sides, seeds, st.booleans())
def test_a_product_multiplies_and_splits_as_its_matrix(ranks, num_out, num_in, seed, is_dense) -> None:
    product = product_of(ranks, num_out, num_in, seed)
    dense = product.dense
    product = Product(dense) if is_dense else product
    x, y = gaussian(2, num_in, 3, seed=7), gaussian(2, num_out, 3, seed=8)
    torch.testing.assert_close(product.times(x), dense @ x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(product.transposed_times(y), dense.mT @ y, rtol=1e-11, atol=1e-11)
    for one, matrix in zip(product.split(), dense, strict=True):
        torch.testing.assert_close(one.dense[0], matrix)


def test_the_lightest_form_holds_the_fewest_numbers() -> None:
    narrow, wide = product_of([2], 6, 5, 0), product_of([3], 6, 5, 0)
    assert narrow.lightest() is narrow  # 2 * (6 + 5) numbers against 30
    assert wide.lightest().right is None  # 33 against 30


@laws
@given(rank_lists.filter(bool), sides, sides, seeds, st.booleans())
def test_decompose_is_the_thin_svd_of_the_dense_sum(ranks, num_out, num_in, seed, is_dense) -> None:
    product = product_of(ranks, num_out, num_in, seed)
    dense = product.dense
    u, s, v = decompose(Product(dense) if is_dense else product)
    number = min(num_out, num_in, *([] if is_dense else [sum(ranks)]))
    assert (u.shape, s.shape, v.shape) == ((2, num_out, number), (2, number), (2, number, num_in))
    expected = torch.linalg.svdvals(dense)
    atol = 1e-12 * (1 + float(expected.max()))
    torch.testing.assert_close(s, expected[:, :number], rtol=0, atol=atol)
    torch.testing.assert_close(u * s[:, None, :] @ v, dense, rtol=0, atol=10 * atol)
    identity = torch.eye(number, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(u.mT @ u, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(v @ v.mT, identity, rtol=0, atol=1e-12)


@laws
@given(rank_lists, sides, sides, st.integers(1, 6), seeds, st.booleans())
def test_truncate_is_the_best_approximation_of_its_rank(ranks, num_out, num_in, rank, seed, is_dense) -> None:
    product = product_of(ranks, num_out, num_in, seed)
    dense = product.dense
    cut = truncate(Product(dense) if is_dense else product, rank, gaussian(2, rank, num_in, seed=7))
    energy = torch.linalg.svdvals(dense).square()
    error = (dense - cut.b_LOR @ cut.a_LRI).square().sum(dim=(1, 2))
    scale = float(energy.sum())
    # by Eckart-Young no matrix of this rank is nearer than the root of the energy left out
    torch.testing.assert_close(error, energy[:, rank:].sum(dim=1), rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(cut.kept_L, energy[:, :rank].sum(dim=1), rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(cut.total_L, energy.sum(dim=1), rtol=0, atol=1e-10 * scale)
    assert cut.a_LRI.shape == (2, rank, num_in)
    assert cut.b_LOR.shape == (2, num_out, rank)


def test_truncate_splits_every_singular_value_evenly() -> None:
    product = product_of([2, 2], 9, 8, 3)
    cut = truncate(product, 3, torch.zeros(2, 3, 8))
    values = torch.linalg.svdvals(product.dense)[:, :3]
    torch.testing.assert_close(cut.b_LOR.square().sum(dim=1), values)
    torch.testing.assert_close(cut.a_LRI.square().sum(dim=2), values)


@pytest.mark.parametrize("flop", [0, 10**12], ids=["decomposed", "range finder"])
@pytest.mark.parametrize("ratio", [0.95, 0.8, 0.5, 0.1, 0.05, 0.02])
def test_a_read_out_is_the_dense_svds_to_the_stated_accuracy(
    ratio: float, flop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algebra, "EIGH_FLOP", flop)
    product, rank = decaying(60, 50, 24, ratio), 6
    u, s, v = torch.linalg.svd(product.dense)
    best = u[:, :, :rank] * s[:, None, :rank] @ v[:, :rank]
    cut = truncate(product, rank, torch.zeros(1, rank, 50))
    found, size = cut.b_LOR @ cut.a_LRI, float(product.dense.norm())
    assert float((found - best).norm()) < 1e-6 * size
    excess = (product.dense - found).norm().square() - (product.dense - best).norm().square()
    assert float(excess) < 1e-12 * size**2


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1.0, 1e6, 1e20])
def test_the_gauge_of_the_factors_does_not_matter(size: float) -> None:
    product = product_of([3, 3], 40, 30, 5, num=1)
    assert product.right is not None
    scales = torch.tensor([1.0, size, 1.0, 1 / size, 1.0, size]).double()
    turned = Product(product.left * scales, product.right / scales[:, None])
    fallback = torch.zeros(1, 2, 30)
    expected, found = truncate(product, 2, fallback), truncate(turned, 2, fallback)
    torch.testing.assert_close(found.kept_L, expected.kept_L, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        found.b_LOR @ found.a_LRI, expected.b_LOR @ expected.a_LRI, rtol=1e-6, atol=1e-6
    )


# Every way to a basis gives the same read-out; which is taken is a matter of cost alone.


@pytest.mark.parametrize(("num_out", "num_in"), [(60, 40), (40, 60)])
@pytest.mark.parametrize("width", [2, 12, 70])
@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("flop", [0, 10**12], ids=["decomposed", "range finder"])
def test_every_way_to_a_basis_keeps_the_same_energy(
    num_out: int, num_in: int, width: int, is_dense: bool, flop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algebra, "EIGH_FLOP", flop)
    product = product_of([width], num_out, num_in, 4)
    energy = torch.linalg.svdvals(product.dense).square()
    product = Product(product.dense) if is_dense else product
    basis = leading_basis(product, 4, gaussian(2, 4, num_in, seed=9))
    kept = torch.linalg.svdvals(product.transposed_times(basis))[:, :4].square().sum(dim=1)
    torch.testing.assert_close(kept, energy[:, :4].sum(dim=1), rtol=1e-9, atol=0)


def test_range_finder_as_wide_as_the_rank_is_exact() -> None:
    """I11: with sketch width p >= rank, M = Q Q^T M; both messages are linear in the clients' products."""
    terms = [product_of([2], 40, 30, seed, num=1) for seed in range(0, 40, 10)]
    total = terms[0].plus(terms[1]).plus(terms[2]).plus(terms[3])  # rank 8
    omega = gaussian(1, 30, 8, seed=77)
    sketch = sum(term.times(omega) for term in terms)
    torch.testing.assert_close(sketch, total.times(omega), rtol=1e-12, atol=1e-12)
    basis, _ = torch.linalg.qr(sketch)
    answer = sum(term.transposed_times(basis) for term in terms)
    torch.testing.assert_close(basis @ answer.mT, total.dense, rtol=1e-12, atol=1e-12)
    narrow, _ = torch.linalg.qr(total.times(omega[:, :, :4]))
    assert float((narrow @ (narrow.mT @ total.dense) - total.dense).norm() / total.dense.norm()) > 0.1
    found = find_range(total, 8, torch.zeros(1, 8, 30))
    torch.testing.assert_close(found @ (found.mT @ total.dense), total.dense, rtol=1e-11, atol=1e-11)


def test_dead_directions_take_a_start_that_can_learn() -> None:
    fallback = gaussian(2, 4, 5, seed=9)
    product = product_of([1], 6, 5, 2)
    cut = truncate(product, 4, fallback)
    torch.testing.assert_close(cut.b_LOR @ cut.a_LRI, product.dense, rtol=1e-12, atol=1e-12)
    assert torch.equal(cut.a_LRI[:, 1:], fallback[:, 1:])
    assert int(cut.b_LOR[:, :, 1:].count_nonzero()) == 0


@pytest.mark.parametrize(
    "product",
    [
        product_of([], 6, 5, 0),
        Product(torch.zeros(2, 6, 2).double(), gaussian(2, 2, 5)),
        Product(gaussian(2, 6, 2), torch.zeros(2, 2, 5).double()),
        Product(torch.zeros(2, 6, 5).double()),
    ],
    ids=["no term", "zero left", "zero right", "zero matrix"],
)
def test_a_zero_matrix_is_read_out_as_a_fresh_adapter(product: Product) -> None:
    fallback = gaussian(2, 3, 5, seed=9)
    cut = truncate(product, 3, fallback)
    assert torch.equal(cut.a_LRI, fallback)
    assert int(cut.b_LOR.count_nonzero()) == 0
    assert float(cut.kept_L.sum()) == float(cut.total_L.sum()) == 0
    assert float(squared_norm(product).sum()) == 0


def test_opposite_terms_cancel() -> None:
    product = product_of([2], 6, 5, 1)
    assert product.right is not None
    assert float(squared_norm(product.plus(Product(-product.left, product.right))).max()) < 1e-28
