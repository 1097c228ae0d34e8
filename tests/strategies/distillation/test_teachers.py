"""Which adapters teach, and with what weight."""

from collections.abc import Callable

import torch

from fedllm.adapters.layout import at_rank, with_rank
from fedllm.messages import ClientUpdate
from strategies.distillation.teachers import Teachers, priors_of


def update(
    client: str, weight: float, delta: torch.Tensor, rank: int = 4, round_num: int = 1
) -> ClientUpdate:
    return ClientUpdate(
        client_id=client,
        round_num=round_num,
        rank=rank,
        delta=delta,
        weight=weight,
        num_tokens=1,
        train_loss=1.0,
    )


def test_teachers_are_the_heaviest_and_of_equals_the_first(trained: Callable) -> None:
    _, before, _, _ = trained()
    start = before.adapter
    delta = torch.ones(start.layout.size)
    teachers = Teachers(start, 1, 2)
    for client, weight in (("a", 1.0), ("b", 3.0), ("c", 1.0), ("d", 3.0), ("e", 2.0), ("f", 3.0)):
        teachers.add(update(client, weight, delta))
        assert len(teachers.kept) <= 2
    assert [kept.client_id for kept in teachers.kept] == ["b", "d"]
    assert [kept.client_id for kept in teachers.without({"b"})] == ["d"]
    assert torch.equal(teachers.kept[0].vector, start.vector + delta)
    assert priors_of(teachers.kept).tolist() == [0.5, 0.5]


def test_teachers_have_their_clients_product_and_are_not_late(
    trained: Callable,
) -> None:
    _, before, _, _ = trained()
    layout = before.adapter.layout
    low = at_rank(layout, 1)
    delta = torch.randn(low.size, generator=torch.Generator().manual_seed(1))
    teachers = Teachers(before.adapter, 2, 8)
    teachers.add(update("late", 9.0, torch.ones(layout.size), round_num=1))
    teachers.add(update("low", 1.0, delta, rank=1, round_num=2))
    (kept,) = teachers.kept
    own = with_rank(before.adapter.vector, layout, 1) + delta
    for (a, b), (own_a, own_b) in zip(layout.factors(kept.vector), low.factors(own), strict=True):
        torch.testing.assert_close(layout.scale * b @ a, low.scale * own_b @ own_a)
