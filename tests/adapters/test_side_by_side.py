"""Two adapters side by side are one adapter whose effect is the sum of theirs."""

import pytest
import torch

from fedllm.adapters.layout import AdapterLayout, LoraMatrix, at_rank, with_rank
from fedllm.adapters.side_by_side import mask_of_second, side_by_side, take_second

SHARED = AdapterLayout((LoraMatrix("a", 7, 5), LoraMatrix("b.c", 4, 9)), 3, 4.5, "f" * 64)


def vectors(second_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(second_rank)
    sizes = SHARED.size, at_rank(SHARED, second_rank).size
    first, second = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return first, second


@pytest.mark.parametrize("second_rank", [1, 2, 3, 8])
def test_their_effects_add_up_and_each_comes_back(second_rank: int) -> None:
    first, second = vectors(second_rank)
    both = side_by_side(SHARED, first, second, second_rank)
    wide, own = at_rank(SHARED, 3 + second_rank), at_rank(SHARED, second_rank)
    assert both.shape == (wide.size,)
    assert wide.scale == pytest.approx(SHARED.scale, rel=1e-15)
    pairs = zip(wide.factors(both), SHARED.factors(first), own.factors(second), strict=True)
    for (a, b), (a1, b1), (a2, b2) in pairs:
        torch.testing.assert_close(b @ a, b1 @ a1 + b2 @ a2)
    assert torch.equal(take_second(SHARED, both, second_rank), second)
    assert torch.equal(with_rank(both, wide, 3), first)


def test_mask_of_second_covers_the_second_adapter_alone() -> None:
    first, second = vectors(2)
    mask = mask_of_second(SHARED, 2)
    both = side_by_side(SHARED, first, second, 2)
    assert int(mask.sum()) == second.numel()
    assert torch.equal(both[~mask].sort().values, first.sort().values)
    assert torch.equal(both[mask].sort().values, second.sort().values)


def test_at_rank_keeps_products_comparable() -> None:
    for rank in (1, 2, 3, 7):
        assert at_rank(SHARED, rank).scale == pytest.approx(SHARED.scale, rel=1e-15)
        assert at_rank(SHARED, rank).rank == rank
    assert at_rank(SHARED, 3) is SHARED
