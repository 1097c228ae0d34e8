"""Aggregation against dense float64 mathematics (algorithms of FedIT and FlexLoRA)."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.errors import LayoutError
from fedllm.plan.aggregation import AggregationRule
from fedllm.runs.checkpoint import ServerState
from fedllm.wire import packets
from strategies.aggregation import combine as combining
from strategies.aggregation import sums
from strategies.exchange.receiving import sort_answers
from strategies.memory import Room
from tests.strategies.aggregation.builders import (
    EXACT,
    LAYOUT,
    RANK,
    READ_OUTS,
    WEIGHTS,
    assert_products_close,
    combine,
    dense,
    dense_mean,
    difference,
    gaussian,
    model_change,
    norm,
    open_mixture,
    random_updates,
    trained_start,
    update,
)


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
    assert result.measured.kept_energy == pytest.approx(1.0)
    assert_products_close(combine(start, updates, "factor-mean").adapter.vector, mean, 1.0)


def test_averaging_factors_is_not_exact_and_svd_is_nearest() -> None:
    start, updates = trained_start(), random_updates(size=0.3)
    mean = dense_mean(start, updates)
    errors = {
        read_out: norm(difference(model_change(combine(start, updates, read_out)), mean))
        for read_out in READ_OUTS
    }
    assert errors["factor-mean"] > 0.2 * norm(mean)
    assert errors["svd"] < errors["projection"] < errors["factor-mean"]
    assert max(errors[name] for name in EXACT) < 1e-6 * norm(mean)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [0.02, 0.5])
@pytest.mark.parametrize("read_out", READ_OUTS)
def test_the_reported_numbers_are_the_dense_ones(read_out: str, seed: int, size: float) -> None:
    start, updates = trained_start(), random_updates(seed, size)
    mean, before = dense_mean(start, updates), dense(start.vector)
    total = sum(WEIGHTS)
    factors = sum(item.weight / total * (start.vector + item.delta).double() for item in updates)
    residual, change = difference(mean, dense(factors)), difference(mean, before)
    result = combine(start, updates, read_out)
    assert result.measured.rho == pytest.approx(norm(residual) / norm(change), rel=1e-6)
    worst = max(norm([r]) / norm([c]) for r, c in zip(residual, change, strict=True))
    assert result.measured.largest_rho == pytest.approx(worst, rel=1e-6)
    assert result.measured.delta_norm == pytest.approx(norm(change) * LAYOUT.scale, rel=1e-6)
    lost = norm(difference(mean, model_change(result)))
    assert result.measured.kept_energy == pytest.approx(max(0.0, 1 - lost**2 / norm(mean) ** 2), abs=1e-6)
    if read_out == "svd":
        energies = [torch.linalg.svdvals(matrix).square() for matrix in mean]
        kept = sum(float(energy[:RANK].sum()) for energy in energies)
        assert result.measured.kept_energy == pytest.approx(kept / norm(mean) ** 2, rel=1e-7)


@pytest.mark.parametrize("read_out", ["svd", "residual", "stack"])
def test_a_change_of_gauge_changes_factor_mean_and_no_product(read_out: str) -> None:
    start = AdapterState(LAYOUT, torch.zeros(LAYOUT.size))
    updates = random_updates(size=1.0)
    turned = []
    for index, item in enumerate(updates):
        gauge = torch.eye(RANK, dtype=torch.float64) + 0.5 * gaussian(RANK**2, index).view(RANK, RANK)
        factors = [
            (gauge @ a_RI.double(), b_OR.double() @ torch.linalg.inv(gauge))
            for a_RI, b_OR in LAYOUT.factors(item.delta)
        ]
        turned.append(update(item.client_id, LAYOUT.flatten(factors).float(), item.weight))
    products = [model_change(combine(start, items, read_out)) for items in (updates, turned)]
    assert norm(difference(*products)) < 1e-4 * norm(products[0])
    means = [dense(combine(start, items, "factor-mean").adapter.vector) for items in (updates, turned)]
    assert norm(difference(*means)) > 0.1 * norm(means[0])


@pytest.mark.parametrize("read_out", [name for name in READ_OUTS if name != "stack"])
@pytest.mark.parametrize("weight", [1.0, 0.3, 1e6])
def test_a_single_client_keeps_its_own_factors_bit_for_bit(read_out: str, weight: float) -> None:
    start, delta = trained_start(), 0.1 * gaussian(LAYOUT.size, 5)
    result = combine(start, [update("a", delta, weight)], read_out)
    assert torch.equal(result.adapter.vector, start.vector + delta)
    assert (result.measured.rho, result.measured.largest_rho, result.measured.kept_energy) == (0.0, 0.0, 1.0)
    assert result.base_delta.size == 0


def test_identical_clients_lose_nothing_by_any_read_out() -> None:
    start, delta = trained_start(), 0.1 * gaussian(LAYOUT.size, 5)
    updates = [update(f"c{index}", delta, weight) for index, weight in enumerate(WEIGHTS)]
    expected = dense(start.vector + delta)
    for read_out in READ_OUTS:
        result = combine(start, updates, read_out)
        assert norm(difference(model_change(result), expected)) < 1e-6 * norm(expected)
        assert result.measured.rho < 1e-12
        assert result.measured.kept_energy == pytest.approx(1.0)


def test_stack_starts_afresh_and_leaves_everything_in_the_base() -> None:
    start, updates = trained_start(), random_updates()
    result = combine(start, updates, "stack")
    assert result.adapter.digest == initial_adapter(LAYOUT, 7).digest
    assert norm(dense(result.adapter.vector)) == 0
    assert result.base_delta.size > 0


def test_base_delta_adds_up_at_the_rank_that_holds_it() -> None:
    state, added = ServerState(0, initial_adapter(LAYOUT, 0)), [torch.zeros(12, 20), torch.zeros(17, 9)]
    for seed in range(4):
        rule = AggregationRule(read_out="residual")
        mixture = replace(open_mixture(state.adapter, rule), state=state)
        updates = random_updates(seed, 0.3)
        for item in updates:
            mixture = combining.add(mixture, item)
        result = combining.finish(mixture)
        residual = difference(dense_mean(state.adapter, updates), dense(result.adapter.vector))
        added = [before + new for before, new in zip(added, residual, strict=True)]
        state = ServerState(seed + 1, result.adapter, base_delta=result.base_delta)
    kept = [b_ON.double() @ a_NI.double() for b_ON, a_NI in state.base_delta.factors]
    assert norm(difference(kept, added)) < 1e-6 * norm(added)
    assert [b_ON.shape[1] for b_ON, _ in state.base_delta.factors] == [12, 9]  # full: no rank is wasted


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(len(WEIGHTS))), st.sampled_from(READ_OUTS))
def test_the_order_of_arrival_changes_no_bit(arrival: list[int], read_out: str) -> None:
    start, updates = trained_start(), random_updates()
    plan = [item.client_id for item in updates]
    expected = combine(start, updates, read_out)
    arrived = [updates[index] for index in arrival]
    ordered = combine(start, list(sort_answers(iter(arrived), plan, Room())), read_out)
    assert ordered.adapter.digest == expected.adapter.digest
    assert ordered.base_delta.digest == expected.base_delta.digest
    products = model_change(expected)
    unordered = difference(model_change(combine(start, arrived, read_out)), products)
    assert norm(unordered) < 1e-6 * norm(products)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), unique=True), st.randoms(use_true_random=False))
def test_answers_come_in_the_plans_order_whoever_is_missing(
    present: list[int], generator: random.Random
) -> None:
    plan = [f"c{number}" for number in range(10)]
    generator.shuffle(plan)
    answers = [update(f"c{number}", torch.zeros(0)) for number in present]
    ordered = [answer.client_id for answer in sort_answers(iter(answers), plan, Room())]
    assert ordered == [client for client in plan if client in {answer.client_id for answer in answers}]


@pytest.mark.parametrize("read_out", READ_OUTS)
def test_a_client_counted_twice_at_half_its_weight_is_one_client(read_out: str) -> None:
    start, updates = trained_start(), random_updates()
    halves = [
        update(f"{item.client_id}{part}", item.delta, item.weight / 2) for item in updates for part in "ab"
    ]
    expected = model_change(combine(start, updates, read_out))
    found = model_change(combine(start, halves, read_out))
    assert norm(difference(found, expected)) < 1e-6 * norm(expected)


@pytest.mark.parametrize("read_out", READ_OUTS)
@pytest.mark.parametrize("factor", [8.0, 1 / 3, 1e9])
def test_only_the_ratio_of_weights_matters(read_out: str, factor: float) -> None:
    start, updates = trained_start(), random_updates()
    scaled = [update(item.client_id, item.delta, item.weight * factor) for item in updates]
    expected, result = combine(start, updates, read_out), combine(start, scaled, read_out)
    products = model_change(expected)
    assert norm(difference(model_change(result), products)) < 1e-6 * norm(products)
    assert result.measured.rho == pytest.approx(expected.measured.rho, rel=1e-6)


@pytest.mark.parametrize("read_out", READ_OUTS)
def test_the_mean_of_many_clients_stays_exact_and_small(read_out: str) -> None:
    start = trained_start()
    updates = [update(f"c{i}", 0.1 * gaussian(LAYOUT.size, i), 1.0 + i % 3) for i in range(60)]
    mixture = open_mixture(start, AggregationRule(read_out=read_out))
    for item in updates:
        mixture = combining.add(mixture, item)
        assert len(mixture.held) <= sums.num_holdable(LAYOUT, with_products=True) < 10
    result, mean = combining.finish(mixture), dense_mean(start, updates)
    change = norm(difference(mean, dense(start.vector)))
    assert result.measured.delta_norm == pytest.approx(change * LAYOUT.scale, rel=1e-6)
    total = sum(item.weight for item in updates)
    factors = sum(item.weight / total * (start.vector + item.delta).double() for item in updates)
    assert result.measured.rho == pytest.approx(norm(difference(mean, dense(factors))) / change, rel=1e-6)
    error = norm(difference(model_change(result), mean))
    if read_out in EXACT:
        assert error < 1e-6 * norm(mean)
    if read_out == "svd":
        energies = [torch.linalg.svdvals(matrix).square() for matrix in mean]
        left_out = sum(float(energy[RANK:].sum()) for energy in energies) ** 0.5
        assert error == pytest.approx(left_out, rel=1e-4)


@pytest.mark.parametrize("read_out", READ_OUTS)
def test_folding_earlier_clients_changes_nothing(read_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, updates = trained_start(), random_updates(size=0.3)
    held = combine(start, updates, read_out)
    monkeypatch.setattr(sums, "num_holdable", lambda layout, with_products: 2)
    folded = combine(start, updates, read_out)
    products = model_change(held)
    assert norm(difference(model_change(folded), products)) < 1e-6 * norm(products)
    for name in ("rho", "largest_rho", "kept_energy", "delta_norm"):
        assert getattr(folded.measured, name) == pytest.approx(getattr(held.measured, name), rel=1e-9)


def test_the_updates_of_a_round_are_a_value() -> None:
    start, updates = trained_start(), random_updates()
    mixture = open_mixture(start, AggregationRule())
    for item in updates[:3]:
        mixture = combining.add(mixture, item)
    before = combining.finish(mixture).adapter.digest
    longer = combining.add(mixture, updates[3])
    assert combining.finish(longer).adapter.digest != before
    assert combining.finish(mixture).adapter.digest == before


@pytest.mark.parametrize("payload", ["bf16", "int8"])
@pytest.mark.parametrize("read_out", READ_OUTS)
def test_a_lossy_wire_moves_the_result_by_less_than_it_rounds(payload: str, read_out: str) -> None:
    """I12: sums are float64 whatever the wire, so nothing is lost beyond what was sent."""
    start, updates = trained_start(), random_updates()
    received = []
    for item in updates:
        packet = packets.encode(item.delta, layout_digest="x", round_num=1, payload=payload)
        vector = packets.decode(packet, layout_digest="x", size=LAYOUT.size)
        received.append(update(item.client_id, vector, item.weight))
    exact, lossy = combine(start, updates, read_out), combine(start, received, read_out)
    rounding = {"bf16": 2.0**-8, "int8": 2.0**-5}[payload]  # of a delta's values, relative
    change = norm(difference(model_change(exact), model_change(lossy))) * LAYOUT.scale
    assert 0 < change < rounding * exact.measured.delta_norm
    if read_out in EXACT:
        mean = dense_mean(start, received)
        assert norm(difference(model_change(lossy), mean)) < 1e-6 * norm(mean)


@pytest.mark.parametrize("read_out", READ_OUTS)
def test_updates_of_zero_keep_the_adapter_trainable(read_out: str) -> None:
    start = initial_adapter(LAYOUT, 0)
    updates = [update(f"c{i}", torch.zeros(LAYOUT.size), weight) for i, weight in enumerate(WEIGHTS)]
    result = combine(start, updates, read_out)
    expected = initial_adapter(LAYOUT, 7) if read_out == "stack" else start
    torch.testing.assert_close(result.adapter.vector, expected.vector, rtol=1e-6, atol=0)
    assert (result.measured.rho, result.measured.kept_energy, result.measured.delta_norm) == (0.0, 1.0, 0.0)
    assert result.base_delta.size == 0


@pytest.mark.parametrize("size", [0, 1, LAYOUT.size - 1, LAYOUT.size + 1, LAYOUT.size // RANK * 4])
def test_a_delta_of_no_possible_rank_is_refused(size: int) -> None:
    """I13: what does not fit the layout never reaches a sum."""
    mixture = open_mixture(trained_start(), AggregationRule())
    with pytest.raises(LayoutError, match=f"an update of {size} values is no adapter of rank 1 to {RANK}"):
        combining.add(mixture, update("a", torch.zeros(size)))
