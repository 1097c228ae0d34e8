"""Aggregation against dense float64 mathematics (algorithms of FedIT and FlexLoRA)."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter, with_rank
from fedllm.errors import LayoutError
from fedllm.messages import ClientUpdate
from fedllm.plan.aggregation import AggregationRule
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import AggregationRecord
from fedllm.wire import packets
from strategies.aggregation import combine as combining
from strategies.aggregation import sums
from strategies.aggregation.combine import Aggregate, RoundUpdates
from strategies.exchange.receiving import sort_answers

RANK = 3
LAYOUT = AdapterLayout((LoraMatrix("wide", 20, 12), LoraMatrix("tall", 9, 17)), RANK, 6.0, "f")
WEIGHTS = (1.0, 2.0, 3.0, 5.0, 8.0, 13.0)
READ_OUTS = ["svd", "factor-mean", "projection", "residual", "stack"]
EXACT = ["residual", "stack"]


def gaussian(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def trained_start() -> AdapterState:
    """Return an adapter that has learnt something: its B is not zero."""
    return AdapterState(LAYOUT, initial_adapter(LAYOUT, 0).vector + 0.2 * gaussian(LAYOUT.size, 99))


def update(client_id: str, delta: torch.Tensor, weight: float = 1.0) -> ClientUpdate:
    return ClientUpdate(
        rank=RANK * delta.numel() // LAYOUT.size,
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


def open_mixture(start: AdapterState, rule: AggregationRule, trained: str = "both") -> RoundUpdates:
    state = ServerState(0, start)
    return combining.init(rule, state, trained=trained, fresh=lambda: initial_adapter(LAYOUT, 7))


def combine(
    start: AdapterState, updates: list[ClientUpdate], read_out: str = "svd", **axes: Any
) -> Aggregate:
    rule = AggregationRule(read_out=read_out, **axes)
    mixture = open_mixture(start, rule, rule.trained_in(1))
    for item in updates:
        mixture = combining.add(mixture, item)
    return combining.finish(mixture)


def dense(vector: torch.Tensor) -> list[torch.Tensor]:
    """Return the matrices B A of an adapter vector."""
    return [b_OR.double() @ a_RI.double() for a_RI, b_OR in LAYOUT.factors(vector)]


def model_change(result: Aggregate) -> list[torch.Tensor]:
    """Return what a read-out adds to the base model in all: adapter and base delta."""
    base_delta = [b_ON.double() @ a_NI.double() for b_ON, a_NI in result.base_delta.factors]
    return [a + b for a, b in zip(dense(result.adapter.vector), base_delta, strict=True)]


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
    assert result.measured.kept_energy == pytest.approx(1.0)
    assert_products_close(combine(start, updates, "factor-mean").adapter.vector, mean, 1.0)


def test_averaging_factors_is_not_exact_and_svd_is_nearest_of_its_rank() -> None:
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


def test_identical_clients_lose_nothing_and_every_read_out_agrees() -> None:
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


def test_base_delta_adds_up_over_rounds_and_stays_at_the_rank_that_holds_it() -> None:
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
    ordered = combine(start, list(sort_answers(iter(arrived), plan)), read_out)
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
    ordered = [answer.client_id for answer in sort_answers(iter(answers), plan)]
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
        assert getattr(folded, name) == pytest.approx(getattr(held, name), rel=1e-9)


def test_a_mixture_is_a_value() -> None:
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
        vector = packets.decode(packet, layout_digest="x", size=LAYOUT.size).vector
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


# --- one factor is common to all: B alone (FFA-LoRA), A alone, or in turn (RoLoRA) ----------------------


def only(part: str, delta: torch.Tensor) -> torch.Tensor:
    return torch.where(combining.part_mask(LAYOUT, part), delta, 0.0)


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


# --- clients of different ranks ---------------------------------------------------------------------------


RANKS = (3, 1, 2, 2, 1, 3)


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
    found = combine(start, updates, read_out, mixed_ranks=True)
    mean = dense_mean(start, grown(start, updates))
    error = norm(difference(model_change(found), mean))
    if read_out in EXACT:
        assert error < 1e-6 * norm(mean)
    else:
        assert found.measured.kept_energy == pytest.approx(1 - error**2 / norm(mean) ** 2, abs=1e-6)
    same = combine(start, grown(start, updates), read_out)
    assert norm(difference(model_change(found), model_change(same))) < 1e-6 * norm(mean)


def test_hetlora_pads_with_zeros_and_weighs_by_the_norm_of_the_product() -> None:
    start = trained_start()
    updates = ranked_updates(start)
    found = combine(start, updates, "factor-mean", weighting="product-norm", mixed_ranks=True)
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
def test_every_column_is_the_mean_over_the_clients_that_train_it(num_copies: int) -> None:
    start, rule = trained_start(), AggregationRule(train="b", read_out="factor-mean", mixed_ranks=True)
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
    mixture = open_mixture(start, AggregationRule(read_out=read_out, mixed_ranks=True))
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
