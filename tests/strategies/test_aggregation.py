"""Aggregation against dense float64 mathematics (algorithms of FedIT and FlexLoRA)."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.types import ClientUpdate
from fedllm.wire import codec
from strategies import aggregation
from strategies.aggregation import Aggregate
from strategies.rounds import _in_order

RANK = 3
LAYOUT = AdapterLayout((LoraMatrix("wide", 20, 12), LoraMatrix("tall", 9, 17)), RANK, 6.0, "f")
WEIGHTS = (1.0, 2.0, 3.0, 5.0, 8.0, 13.0)
READ_OUTS = ["svd", "factor-mean"]


def gaussian(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def trained_start() -> AdapterState:
    """Return an adapter that has learnt something: its B is not zero."""
    return AdapterState(LAYOUT, initial_adapter(LAYOUT, 0).vector + 0.2 * gaussian(LAYOUT.size, 99))


def update(client_id: str, delta: torch.Tensor, weight: float = 1.0) -> ClientUpdate:
    return ClientUpdate(
        rank=LAYOUT.rank,
        client_id=client_id,
        round_num=1,
        delta=delta,
        weight=weight,
        num_tokens=1,
        train_loss=0.5,
    )


def random_updates(seed: int = 0, size: float = 0.1) -> list[ClientUpdate]:
    return [
        update(f"c{index}", size * gaussian(LAYOUT.size, 10 * seed + index), weight)
        for index, weight in enumerate(WEIGHTS)
    ]


def combine(start: AdapterState, updates: list[ClientUpdate], read_out: str = "svd") -> Aggregate:
    mixture = aggregation.init(start)
    for item in updates:
        mixture = aggregation.add(mixture, item)
    return aggregation.finish(mixture, read_out)


def dense(vector: torch.Tensor) -> list[torch.Tensor]:
    """Return the matrices B A of an adapter vector."""
    return [b_OR.double() @ a_RI.double() for a_RI, b_OR in LAYOUT.factors(vector)]


def dense_mean(start: AdapterState, updates: list[ClientUpdate]) -> list[torch.Tensor]:
    """Return M = sum of p_i B_i A_i, the mean a federation wants."""
    total = sum(item.weight for item in updates)
    products = [dense(start.vector + item.delta) for item in updates]
    return [
        sum(item.weight / total * product[index] for item, product in zip(updates, products, strict=True))
        for index in range(len(LAYOUT.matrices))
    ]


def norm(matrices: list[torch.Tensor]) -> float:
    return float(sum(matrix.square().sum() for matrix in matrices)) ** 0.5


def difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> list[torch.Tensor]:
    return [a - b for a, b in zip(first, second, strict=True)]


def assert_products_close(vector: torch.Tensor, matrices: list[torch.Tensor], rel: float) -> None:
    assert norm(difference(dense(vector), matrices)) <= rel * norm(matrices)


def test_factor_mean_is_the_weighted_mean_of_the_factors() -> None:
    start, updates = trained_start(), random_updates()
    total = sum(WEIGHTS)
    expected = sum(item.weight / total * (start.vector + item.delta).double() for item in updates)
    found = combine(start, updates, "factor-mean").adapter.vector
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_svd_reads_out_the_best_approximation_of_the_exact_mean(seed: int) -> None:
    start, updates = trained_start(), random_updates(seed)
    truncated = []
    for matrix in dense_mean(start, updates):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        truncated.append(u[:, :RANK] * s[:RANK] @ v[:RANK])
    assert_products_close(combine(start, updates).adapter.vector, truncated, 1.5e-6)


def test_svd_is_exact_where_the_rank_suffices() -> None:
    start = AdapterState(LAYOUT, torch.zeros(LAYOUT.size))
    updates = random_updates(size=1.0)[:RANK]
    for index, item in enumerate(updates):  # client i uses direction i only, so the mean has rank 3
        for a_RI, b_OR in LAYOUT.factors(item.delta):
            others = [direction for direction in range(RANK) if direction != index]
            a_RI[others], b_OR[:, others] = 0.0, 0.0
    mean = dense_mean(start, updates)
    result = combine(start, updates)
    assert_products_close(result.adapter.vector, mean, 1e-6)
    assert result.kept_energy == pytest.approx(1.0)
    assert_products_close(combine(start, updates, "factor-mean").adapter.vector, mean, 1.0)


def test_averaging_factors_is_not_exact_and_svd_is_nearer() -> None:
    start, updates = trained_start(), random_updates(size=0.3)
    mean = dense_mean(start, updates)
    errors = {
        read_out: norm(difference(dense(combine(start, updates, read_out).adapter.vector), mean))
        for read_out in READ_OUTS
    }
    assert errors["factor-mean"] > 0.2 * norm(mean)
    assert errors["svd"] < errors["factor-mean"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [0.02, 0.5])
def test_the_reported_numbers_are_the_dense_ones(seed: int, size: float) -> None:
    start, updates = trained_start(), random_updates(seed, size)
    mean, before = dense_mean(start, updates), dense(start.vector)
    total = sum(WEIGHTS)
    factors = sum(item.weight / total * (start.vector + item.delta).double() for item in updates)
    change = norm(difference(mean, before))
    energies = [torch.linalg.svdvals(matrix).square() for matrix in mean]
    kept = sum(float(energy[:RANK].sum()) for energy in energies) / sum(float(e.sum()) for e in energies)
    for read_out in READ_OUTS:
        result = combine(start, updates, read_out)
        assert result.rho == pytest.approx(norm(difference(mean, dense(factors))) / change, rel=1e-6)
        assert result.kept_energy == pytest.approx(kept, rel=1e-9)
        assert result.delta_norm == pytest.approx(change * LAYOUT.scale, rel=1e-6)


def test_a_change_of_gauge_changes_factor_mean_and_not_svd() -> None:
    start = AdapterState(LAYOUT, torch.zeros(LAYOUT.size))
    updates = random_updates(size=1.0)
    turned = []
    for index, item in enumerate(updates):
        gauge = torch.eye(RANK, dtype=torch.float64) + 0.5 * gaussian(RANK**2, index).view(RANK, RANK)
        factors = [
            (gauge @ a_RI.double(), b_OR.double() @ torch.linalg.inv(gauge))
            for a_RI, b_OR in LAYOUT.factors(item.delta)
        ]
        turned.append(update(item.client_id, LAYOUT.flatten(factors), item.weight))
    svd = [dense(combine(start, items).adapter.vector) for items in (updates, turned)]
    assert norm(difference(*svd)) < 1e-4 * norm(svd[0])
    means = [dense(combine(start, items, "factor-mean").adapter.vector) for items in (updates, turned)]
    assert norm(difference(*means)) > 0.1 * norm(means[0])


@pytest.mark.parametrize("read_out", READ_OUTS)
@pytest.mark.parametrize("weight", [1.0, 0.3, 1e6])
def test_a_single_client_keeps_its_own_factors_bit_for_bit(read_out: str, weight: float) -> None:
    start, delta = trained_start(), 0.1 * gaussian(LAYOUT.size, 5)
    result = combine(start, [update("a", delta, weight)], read_out)
    assert torch.equal(result.adapter.vector, start.vector + delta)
    assert result.rho < 1e-6
    assert result.kept_energy == pytest.approx(1.0)


def test_identical_clients_lose_nothing_and_every_read_out_agrees() -> None:
    start, delta = trained_start(), 0.1 * gaussian(LAYOUT.size, 5)
    updates = [update(f"c{index}", delta, weight) for index, weight in enumerate(WEIGHTS)]
    expected = dense(start.vector + delta)
    for read_out in READ_OUTS:
        result = combine(start, updates, read_out)
        assert_products_close(result.adapter.vector, expected, 1e-6)
        assert result.rho < 1e-6
        assert result.kept_energy == pytest.approx(1.0)


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(len(WEIGHTS))), st.sampled_from(READ_OUTS))
def test_the_order_of_arrival_changes_no_bit(arrival: list[int], read_out: str) -> None:
    start, updates = trained_start(), random_updates()
    plan = [item.client_id for item in updates]
    expected = combine(start, updates, read_out).adapter
    arrived = [updates[index] for index in arrival]
    assert combine(start, list(_in_order(iter(arrived), plan)), read_out).adapter.digest == expected.digest
    unordered = combine(start, arrived, read_out).adapter
    assert_products_close(unordered.vector, dense(expected.vector), 1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), unique=True), st.randoms(use_true_random=False))
def test_answers_come_in_the_plans_order_whoever_is_missing(
    present: list[int], generator: random.Random
) -> None:
    plan = [f"c{number}" for number in range(10)]
    generator.shuffle(plan)
    answers = [update(f"c{number}", torch.zeros(0)) for number in present]
    ordered = [answer.client_id for answer in _in_order(iter(answers), plan)]
    assert ordered == [client for client in plan if client in {answer.client_id for answer in answers}]


@pytest.mark.parametrize("read_out", READ_OUTS)
def test_a_client_counted_twice_at_half_its_weight_is_one_client(read_out: str) -> None:
    start, updates = trained_start(), random_updates()
    halves = [
        update(f"{item.client_id}{part}", item.delta, item.weight / 2) for item in updates for part in "ab"
    ]
    expected = combine(start, updates, read_out).adapter.vector
    assert_products_close(combine(start, halves, read_out).adapter.vector, dense(expected), 1e-6)


@pytest.mark.parametrize("read_out", READ_OUTS)
@pytest.mark.parametrize("factor", [8.0, 1 / 3, 1e9])
def test_only_the_ratio_of_weights_matters(read_out: str, factor: float) -> None:
    start, updates = trained_start(), random_updates()
    scaled = [update(item.client_id, item.delta, item.weight * factor) for item in updates]
    expected = combine(start, updates, read_out)
    result = combine(start, scaled, read_out)
    assert_products_close(result.adapter.vector, dense(expected.adapter.vector), 1e-6)
    assert result.rho == pytest.approx(expected.rho, rel=1e-6)


@pytest.mark.parametrize("read_out", READ_OUTS)
def test_the_mean_of_many_clients_stays_exact(read_out: str) -> None:
    start = trained_start()
    updates = [update(f"c{i}", 0.1 * gaussian(LAYOUT.size, i), 1.0 + i % 3) for i in range(60)]
    result = combine(start, updates, read_out)
    mean = dense_mean(start, updates)
    assert result.delta_norm == pytest.approx(
        norm(difference(mean, dense(start.vector))) * LAYOUT.scale, rel=1e-6
    )
    energies = [torch.linalg.svdvals(matrix).square() for matrix in mean]
    left_out = sum(float(energy[RANK:].sum()) for energy in energies) ** 0.5
    error = norm(difference(dense(result.adapter.vector), mean))
    assert error >= left_out * (1 - 1e-6)
    if read_out == "svd":
        assert error == pytest.approx(left_out, rel=1e-4)


@pytest.mark.parametrize("payload", ["bf16", "int8"])
@pytest.mark.parametrize("read_out", READ_OUTS)
def test_a_lossy_wire_moves_the_result_by_less_than_it_rounds(payload: str, read_out: str) -> None:
    start, updates = trained_start(), random_updates()
    received = []
    for item in updates:
        packet = codec.encode(item.delta, layout_digest="x", round_num=1, payload=payload)
        vector = codec.decode(packet, layout_digest="x", size=LAYOUT.size).vector
        received.append(update(item.client_id, vector, item.weight))
    exact, lossy = combine(start, updates, read_out), combine(start, received, read_out)
    rounding = {"bf16": 2.0**-8, "int8": 2.0**-5}[payload]  # of a delta's values, relative
    change = norm(difference(dense(exact.adapter.vector), dense(lossy.adapter.vector))) * LAYOUT.scale
    assert 0 < change < rounding * exact.delta_norm


@pytest.mark.parametrize("read_out", READ_OUTS)
def test_updates_of_zero_keep_the_adapter_trainable(read_out: str) -> None:
    start = initial_adapter(LAYOUT, 0)
    updates = [update(f"c{i}", torch.zeros(LAYOUT.size), weight) for i, weight in enumerate(WEIGHTS)]
    result = combine(start, updates, read_out)
    torch.testing.assert_close(result.adapter.vector, start.vector, rtol=1e-6, atol=0)
    assert (result.rho, result.kept_energy, result.delta_norm) == (0.0, 1.0, 0.0)
