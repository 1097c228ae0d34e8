import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.algebra import Product
from fedllm.adapters.base_delta import (
    BaseDelta,
    adapter_with_base_delta,
    flat_size,
    from_flat,
    from_tensors,
    no_base_delta,
    to_flat,
    to_tensors,
)
from fedllm.adapters.layout import AdapterLayout, LoraMatrix, initial_adapter
from fedllm.errors import LayoutError, NonFiniteError

LAYOUT = AdapterLayout((LoraMatrix("a", 6, 5), LoraMatrix("b", 4, 9)), 2, 4.0, "f")


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(num_out: int, num_in: int, rank: int, seed: int) -> Product:
    return Product(gaussian(1, num_out, rank, seed=seed), gaussian(1, rank, num_in, seed=seed + 1))


def dense(base_delta: BaseDelta) -> list[torch.Tensor]:
    return [b_ON.double() @ a_NI.double() for b_ON, a_NI in base_delta.factors]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=6), st.integers(0, 2**20))
def test_base_delta_is_a_sum_at_the_lowest_rank(added: list[tuple[int, bool]], seed: int) -> None:
    base_delta, total = no_base_delta(LAYOUT), torch.zeros(5, 6).double()
    for index, (rank, is_dense) in enumerate(added):
        one = product(5, 6, rank, seed + 10 * index)
        total = total + one.dense[0]
        base_delta = base_delta.plus({0: Product(one.dense) if is_dense else one})
    found, untouched = dense(base_delta)
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-5)
    assert base_delta.factors[0][0].shape[1] == min(5, sum(rank for rank, _ in added))
    assert untouched.abs().sum() == 0


def test_what_is_added_and_taken_away_leaves_no_rank_behind() -> None:
    one = product(5, 6, 2, 3)
    assert one.right is not None
    pair = BaseDelta(
        LAYOUT, ((one.left[0].float(), one.right[0].float()), (torch.zeros(9, 0), torch.zeros(0, 4)))
    )
    back = Product(-one.left.float().double(), one.right.float().double())
    assert pair.plus({0: back}).size == 0


def test_a_digest_tells_base_deltas_apart_and_nothing_has_none() -> None:
    base_delta = no_base_delta(LAYOUT)
    assert (base_delta.size, base_delta.digest) == (0, "")
    first, second = base_delta.plus({0: product(5, 6, 1, 5)}), base_delta.plus({1: product(9, 4, 1, 5)})
    assert first.digest != second.digest
    assert first.digest == base_delta.plus({0: product(5, 6, 1, 5)}).digest


@given(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.integers(0, 2**20))
def test_base_delta_both_written_forms_give_it_back(ranks: tuple[int, int], seed: int) -> None:
    pairs = [
        (gaussian(m.out_features, n, seed=seed).float(), gaussian(n, m.in_features, seed=seed + 1).float())
        for m, n in zip(LAYOUT.matrices, ranks, strict=True)
    ]
    base_delta = BaseDelta(LAYOUT, tuple(pairs))
    assert from_tensors(LAYOUT, to_tensors(base_delta)).digest == base_delta.digest
    flat, written_ranks = to_flat(base_delta)
    assert len(flat) == flat_size(LAYOUT, written_ranks) == base_delta.size
    assert from_flat(LAYOUT, flat, written_ranks).digest == base_delta.digest


def test_base_delta_with_a_missing_tensor_is_refused() -> None:
    tensors = to_tensors(no_base_delta(LAYOUT))
    del tensors["b.A"]
    with pytest.raises(LayoutError, match=r"b\.A"):
        from_tensors(LAYOUT, tensors)


def test_a_base_delta_of_other_shapes_or_values_is_refused() -> None:
    with pytest.raises(LayoutError, match="does not name every matrix"):
        BaseDelta(LAYOUT, ())
    with pytest.raises(LayoutError, match="the base delta of b has the wrong shape"):
        BaseDelta(
            LAYOUT,
            ((torch.zeros(5, 0), torch.zeros(0, 6)), (torch.zeros(9, 2), torch.zeros(1, 4))),
        )
    bad = BaseDelta(
        LAYOUT,
        ((torch.full((5, 1), torch.inf), torch.zeros(1, 6)), (torch.zeros(9, 0), torch.zeros(0, 4))),
    )
    with pytest.raises(NonFiniteError, match="the base delta holds NaN or infinite values"):
        bad.checked_finite()


def test_adapter_with_base_delta_is_one_ordinary_adapter() -> None:
    adapter = initial_adapter(LAYOUT, 0)
    assert adapter_with_base_delta(adapter, no_base_delta(LAYOUT)) is adapter
    base_delta = no_base_delta(LAYOUT).plus({0: product(5, 6, 1, 5), 1: product(9, 4, 3, 7)})
    whole = adapter_with_base_delta(adapter, base_delta)
    assert whole.layout.rank == 2 + 3
    assert whole.layout.scale == LAYOUT.scale
    assert whole.layout.fingerprint == LAYOUT.fingerprint
    parts = zip(LAYOUT.factors(adapter.vector), dense(base_delta), strict=True)
    for (a, b), ((a_RI, b_OR), matrix) in zip(whole.layout.factors(whole.vector), parts, strict=True):
        torch.testing.assert_close(b.double() @ a.double(), b_OR.double() @ a_RI.double() + matrix)
