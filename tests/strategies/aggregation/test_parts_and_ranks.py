"""Aggregation of clients that share one factor alone, or whose ranks and scales differ."""

from dataclasses import replace

import pytest
import torch

from fedllm.adapters.layout import AdapterState, initial_adapter, with_rank
from fedllm.messages import ClientUpdate
from fedllm.plan.aggregation import AggregationRule
from fedllm.runs.records import AggregationRecord
from strategies.aggregation import combine as combining
from tests.strategies.aggregation.builders import (
    EXACT,
    LAYOUT,
    RANK,
    WEIGHTS,
    assert_products_close,
    combine,
    dense,
    dense_mean,
    difference,
    gaussian,
    model_change,
    norm,
    only,
    open_mixture,
    random_updates,
    trained_start,
    update,
)

RANKS = (3, 1, 2, 2, 1, 3)


@pytest.mark.parametrize("part", ["a", "b"])
def test_the_mean_of_one_factor_is_exact(part: str) -> None:
    """I3: B' A_0 = M, and A' under B_0 likewise."""
    start = trained_start()
    updates = [update(u.client_id, only(part, u.delta), u.weight) for u in random_updates(size=0.5)]
    found, mean = combine(start, updates, "factor-mean", train=part), dense_mean(start, updates)
    assert_products_close(found.adapter.vector, mean, 1e-6)
    assert (found.measured.rho, found.measured.kept_energy) == (0.0, 1.0)
    change = norm(difference(mean, dense(start.vector))) * LAYOUT.scale
    assert found.measured.delta_norm == pytest.approx(change, rel=1e-6)
    other = {"a": "b", "b": "a"}[part]
    assert torch.equal(only(other, found.adapter.vector), only(other, start.vector))


@pytest.mark.parametrize("part", ["a", "b"])
def test_what_a_client_sends_of_the_frozen_factor_is_not_read(part: str) -> None:
    start, whole = trained_start(), random_updates()
    cut = [update(item.client_id, only(part, item.delta), item.weight) for item in whole]
    found, expected = (combine(start, updates, "factor-mean", train=part) for updates in (whole, cut))
    assert found.adapter.digest == expected.adapter.digest


def test_local_b_averages_a_and_leaves_the_servers_b_alone() -> None:
    start, updates = initial_adapter(LAYOUT, 0), random_updates()
    result = combine(start, updates, "local-b")
    total = sum(WEIGHTS)
    mean = sum(item.weight / total * (start.vector + item.delta).double() for item in updates)
    torch.testing.assert_close(result.adapter.vector, only("a", mean).float(), rtol=1e-6, atol=1e-7)
    assert norm(dense(result.adapter.vector)) == 0
    moved = float((result.adapter.vector - start.vector).norm())
    assert result.measured == AggregationRecord(delta_norm=pytest.approx(moved))


def ranked_updates(start: AdapterState, size: float = 0.2) -> list[ClientUpdate]:
    """Return updates that begin at the first columns of the start."""
    return [
        update(f"c{i}", size * gaussian(len(with_rank(start.vector, LAYOUT, rank)), i), weight)
        for i, (rank, weight) in enumerate(zip(RANKS, WEIGHTS, strict=True))
    ]


def grown(start: AdapterState, updates: list[ClientUpdate]) -> list[ClientUpdate]:
    """Return the same clients at the run's rank, what they do not have as zeros."""
    found = []
    for item, rank in zip(updates, RANKS, strict=True):
        own = replace(LAYOUT, rank=rank, alpha=LAYOUT.scale * rank)
        adapter = with_rank(start.vector, LAYOUT, rank) + item.delta
        found.append(update(item.client_id, with_rank(adapter, own, RANK) - start.vector, item.weight))
    return found


@pytest.mark.parametrize("read_out", ["svd", "projection", "residual", "stack"])
def test_clients_of_different_ranks_mix_as_their_products(read_out: str) -> None:
    start = trained_start()
    updates = ranked_updates(start)
    found = combine(start, updates, read_out)
    mean = dense_mean(start, grown(start, updates))
    error = norm(difference(model_change(found), mean))
    if read_out in EXACT:
        assert error < 1e-6 * norm(mean)
    else:
        assert found.measured.kept_energy == pytest.approx(1 - error**2 / norm(mean) ** 2, abs=1e-6)
    same = combine(start, grown(start, updates), read_out)
    assert norm(difference(model_change(found), model_change(same))) < 1e-6 * norm(mean)


def test_hetlora_pads_with_zeros_and_weighs_by_product_norm() -> None:
    start = trained_start()
    updates = ranked_updates(start)
    found = combine(start, updates, "factor-mean", weighting="product-norm")
    padded = [start.vector.double() + item.delta for item in grown(start, updates)]
    norms = [item.weight * norm(dense(adapter)) for item, adapter in zip(updates, padded, strict=True)]
    expected = sum(size * adapter for size, adapter in zip(norms, padded, strict=True)) / sum(norms)
    torch.testing.assert_close(found.adapter.vector.double(), expected, rtol=1e-5, atol=1e-6)


def test_product_norms_of_zero_leave_an_ordinary_mean() -> None:
    start = AdapterState(LAYOUT, torch.zeros(LAYOUT.size))
    updates = [update(u.client_id, only("a", u.delta)) for u in random_updates()]
    found = combine(start, updates, "factor-mean", weighting="product-norm")
    expected = sum(item.delta.double() for item in updates) / len(updates)
    torch.testing.assert_close(found.adapter.vector, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_copies", [1, 8])  # the second is folded on the way
def test_a_column_is_the_mean_over_clients_that_train_it(num_copies: int) -> None:
    start, rule = trained_start(), AggregationRule(train="b", read_out="factor-mean")
    updates = [item for item in ranked_updates(start) if RANKS[int(item.client_id[1:])] < 3]
    mixture = open_mixture(start, rule, "b")
    for item in updates * num_copies:
        mixture = combining.add(mixture, item)
    found = LAYOUT.factors(combining.finish(mixture).adapter.vector)
    ranks = [RANKS[int(item.client_id[1:])] for item in updates]
    for index, (a_RI, b_OR) in enumerate(LAYOUT.factors(start.vector)):
        assert torch.equal(found[index][0], a_RI)
        for column in range(RANK):
            trains = [(u, r) for u, r in zip(updates, ranks, strict=True) if r > column]
            total = sum(item.weight for item, _ in trains)
            expected = b_OR[:, column].double()
            for item, rank in trains:
                own = replace(LAYOUT, rank=rank, alpha=LAYOUT.scale * rank)
                expected = expected + item.weight / total * own.factors(item.delta)[index][1][:, column]
            torch.testing.assert_close(found[index][1][:, column], expected.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0][1][:, 2], LAYOUT.factors(start.vector)[0][1][:, 2])  # nobody trains it


@pytest.mark.parametrize("read_out", ["svd", "residual", "stack"])
def test_every_clients_own_scale_is_folded_into_its_product(read_out: str) -> None:
    """I2 with unequal alphas: M = sum p_i s_i B_i A_i, in units of the run's scale."""
    start, scales = trained_start(), (0.5, 1.0, 2.0, 3.0, 4.0, 8.0)
    mixture = open_mixture(start, AggregationRule(read_out=read_out))
    updates, total = ranked_updates(start), sum(WEIGHTS)
    for item, scale in zip(updates, scales, strict=True):
        mixture = combining.add(mixture, item, scale)
    found = combining.finish(mixture)
    mean = [torch.zeros(12, 20).double(), torch.zeros(17, 9).double()]
    for item, rank, scale in zip(updates, RANKS, scales, strict=True):
        own = replace(LAYOUT, rank=rank, alpha=scale * rank)
        for matrix, (a_RI, b_OR) in zip(
            mean, own.factors(with_rank(start.vector, LAYOUT, rank) + item.delta), strict=True
        ):
            matrix += item.weight / total * scale / LAYOUT.scale * b_OR.double() @ a_RI.double()
    error = norm(difference(model_change(found), mean))
    if read_out == "svd":
        energies = [torch.linalg.svdvals(matrix).square() for matrix in mean]
        assert error == pytest.approx(sum(float(e[RANK:].sum()) for e in energies) ** 0.5, rel=1e-5)
    else:
        assert error < 1e-6 * norm(mean)
