"""Robust rules: closed forms, what attackers achieve, and every rule beside every hostile reply."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.config.run_config import KEYS
from fedllm.messages import ClientUpdate
from fedllm.plan.aggregation import COORDINATE_RULES, AggregationRule
from fedllm.runs.checkpoint import ServerState
from strategies.aggregation import combine, robust

RANK = 3
LAYOUT = AdapterLayout((LoraMatrix("wide", 20, 12), LoraMatrix("tall", 9, 17)), RANK, 6.0, "f")
ROBUST_RULES = tuple(KEYS["aggregation.robust"].words)
GRAM_RULES = [name for name in ROBUST_RULES if name != "none" and name not in COORDINATE_RULES]
READ_OUTS = ["svd", "factor-mean", "projection", "residual", "stack"]


def gaussian(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def start_adapter() -> AdapterState:
    return AdapterState(LAYOUT, initial_adapter(LAYOUT, 0).vector + 0.2 * gaussian(LAYOUT.size, 99))


def update(name: str, delta: torch.Tensor, weight: float = 1.0) -> ClientUpdate:
    return ClientUpdate(
        client_id=name, rank=RANK, round_num=1, delta=delta, weight=weight, num_tokens=1, train_loss=0.5
    )


def honest_updates(number: int = 8) -> list[ClientUpdate]:
    """Return clients that agree on a direction and differ around it, as clients do."""
    common = gaussian(LAYOUT.size, 1)
    return [
        update(f"c{index}", 0.05 * (common + 0.5 * gaussian(LAYOUT.size, 100 + index)))
        for index in range(number)
    ]


def aggregate(
    updates: list[ClientUpdate], state: ServerState | None = None, **axes: Any
) -> combine.Aggregate:
    rule = AggregationRule(**axes)
    state = state or ServerState(0, start_adapter())
    mixture = combine.RoundUpdates(
        rule, state, trained=rule.trained_in(1), fresh=lambda: initial_adapter(LAYOUT, 7)
    )
    for item in updates:
        mixture = combine.add(mixture, item)
    return combine.finish(mixture)


def products(vector: torch.Tensor) -> torch.Tensor:
    """Return all matrices B A of an adapter, flat."""
    return torch.cat([(b_OR.double() @ a_RI.double()).flatten() for a_RI, b_OR in LAYOUT.factors(vector)])


def model_change(result: combine.Aggregate) -> torch.Tensor:
    base_delta = torch.cat([(b.double() @ a.double()).flatten() for b, a in result.base_delta.factors])
    return products(result.adapter.vector) + base_delta


def changes(updates: list[ClientUpdate]) -> torch.Tensor:
    """Return the dense changes D_i [K, entries], in the units of the model."""
    start = start_adapter().vector
    return LAYOUT.scale * torch.stack([products(start + u.delta) - products(start) for u in updates])


# --- Gram matrices and closed forms -----------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, RANK])  # small ranks go by factors, large ones by the matrix
def test_gram_matrices_are_those_of_the_dense_changes(rank: int) -> None:
    layout = AdapterLayout((LoraMatrix("wide", 20, 12), LoraMatrix("tall", 9, 17)), rank, 2.0 * rank, "f")
    start = gaussian(layout.size, 1)
    adapters = [start + 0.1 * gaussian(layout.size, 10 + index) for index in range(5)]

    def dense(vector: torch.Tensor) -> torch.Tensor:
        return torch.cat([(b.double() @ a.double()).flatten() for a, b in layout.factors(vector)])

    rows = layout.scale * torch.stack([dense(adapter) - dense(start) for adapter in adapters])
    found = robust.change_grams(layout, start, [adapter - start for adapter in adapters])
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**20))
def test_the_geometric_median_is_where_the_pulls_balance(count: int, size: int, seed: int) -> None:
    points = gaussian(count * size, seed).view(count, size).double()
    weights = gaussian(count, seed + 1).abs().double() + 0.1
    p_K = weights / weights.sum()
    a_K = robust.geometric_median(points @ points.T, p_K)
    assert float(a_K.sum()) == pytest.approx(1.0)

    def objective(point: torch.Tensor) -> float:
        return float((p_K * (points - point).norm(dim=1)).sum())

    found, slack = objective(a_K @ points), 1e-3  # steps are slow where it is a client's own point
    generator = torch.Generator().manual_seed(seed)
    for size_of_move in (1e-3, 1e-1, 1.0):
        for _ in range(10):
            move = torch.randn(points.shape[1], generator=generator).double() * size_of_move
            assert found <= objective(a_K @ points + move) + slack
    assert found <= min(objective(point) for point in points) + slack


def test_the_geometric_median_on_a_line_is_the_median() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [50.0], [1e6]]).double()
    a_K = robust.geometric_median(points @ points.T, torch.full((5,), 0.2).double())
    assert float(a_K @ points[:, 0]) == pytest.approx(2.0, abs=1e-3)


def test_multi_krum_keeps_clients_with_the_closest_neighbours() -> None:
    points = torch.tensor([[0.0], [0.1], [0.2], [0.3], [9.0], [10.0], [-30.0]]).double()
    p_K = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).double() / 28
    verdict = robust.weigh_clients("multi-krum", points @ points.T, p_K, max_malicious=3 / 7, norms=())
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0]).double() / 10
    torch.testing.assert_close(verdict.coefficients, expected)


def test_norms_are_clipped_at_twice_the_running_median() -> None:
    grams = torch.diag(torch.tensor([1.0, 4.0, 9.0, 10_000.0]).double())
    p_K = torch.full((4,), 0.25).double()
    verdict = robust.weigh_clients("norm-clip", grams, p_K, max_malicious=0.2, norms=())
    torch.testing.assert_close(verdict.shrink, torch.tensor([1.0, 1.0, 1.0, 4 / 100]).double())
    verdict = robust.weigh_clients("norm-clip", grams, p_K, max_malicious=0.2, norms=(0.1, 0.1))
    torch.testing.assert_close(verdict.shrink, torch.tensor([0.2, 0.1, 0.2 / 3, 0.2 / 100]).double())
    assert robust.remember_norms(tuple(float(n) for n in range(20)), grams) == (13, 14, 15, 16, 17, 18, 19, 2)


@pytest.mark.parametrize(
    ("clients", "share", "number"),
    [
        (10, 0.2, 2),
        (10, 0.21, 3),
        (4, 0.2, 1),
        (3, 0.5, 1),
        (2, 0.5, 0),
        (1, 0.5, 0),
        (10, 0.5, 4),
        (5, 0.0, 0),
    ],
)
def test_malicious_clients_are_a_minority_rounded_up(clients: int, share: float, number: int) -> None:
    assert robust.num_malicious(clients, share) == number


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(0, 2**20), st.floats(0, 0.5))
def test_coordinate_rules_are_sorting(count: int, seed: int, share: float) -> None:
    deltas = [gaussian(LAYOUT.size, seed + index) for index in range(count)]
    ordered = torch.stack(deltas).double().sort(dim=0).values
    median = ordered[(count - 1) // 2 : count // 2 + 1].mean(dim=0)
    torch.testing.assert_close(robust.combine_coordinates("coordinate-median", deltas, share), median)
    cut = robust.num_malicious(count, share)
    trimmed = ordered[cut : count - cut].mean(dim=0)
    torch.testing.assert_close(robust.combine_coordinates("trimmed-mean", deltas, share), trimmed)


def test_coordinate_rules_work_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [gaussian(LAYOUT.size, index) for index in range(5)]
    whole = robust.combine_coordinates("trimmed-mean", deltas, 0.2)
    monkeypatch.setattr(robust, "COORDINATES_AT_ONCE", 33)
    assert torch.equal(robust.combine_coordinates("trimmed-mean", deltas, 0.2), whole)


@pytest.mark.parametrize("rank", [1, RANK])
def test_small_changes_of_a_large_product_keep_their_digits(rank: int) -> None:
    layout = AdapterLayout((LoraMatrix("wide", 20, 12), LoraMatrix("tall", 9, 17)), rank, 2.0 * rank, "f")
    start, deltas = 1e3 * gaussian(layout.size, 1), [1e-5 * gaussian(layout.size, 10 + i) for i in range(3)]
    rows = []
    for delta in deltas:  # B_0 a + b A_0; what is missing, b a, is 1e-8 of it
        pairs = zip(layout.factors(start.double()), layout.factors(delta.double()), strict=True)
        rows.append(torch.cat([(b_0 @ a + b @ a_0).flatten() for (a_0, b_0), (a, b) in pairs]))
    expected = layout.scale**2 * torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(robust.change_grams(layout, start, deltas), expected, rtol=1e-6, atol=1e-9)


# --- rules on products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAM_RULES)
@pytest.mark.parametrize("read_out", ["residual", "stack"])
def test_the_model_moves_by_the_weighted_changes(name: str, read_out: str) -> None:
    """Start + sum a_i D_i, whatever the read-out; exact read-outs show it."""
    updates = [*honest_updates(6), update("far", 3.0 * gaussian(LAYOUT.size, 5), 2.0)]
    weights = torch.tensor([item.weight for item in updates]).double()
    rows = changes(updates)
    verdict = robust.weigh_clients(name, rows @ rows.T, weights / weights.sum(), max_malicious=0.2, norms=())
    found = model_change(aggregate(updates, read_out=read_out, robust=name))
    expected = products(start_adapter().vector) + verdict.coefficients @ rows / LAYOUT.scale
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", GRAM_RULES)
def test_a_change_of_gauge_changes_no_verdict(name: str) -> None:
    start = AdapterState(LAYOUT, torch.zeros(LAYOUT.size))
    updates, turned = [update(f"c{i}", gaussian(LAYOUT.size, i)) for i in range(5)], []
    for index, item in enumerate(updates):
        factors = []
        for a_RI, b_OR in LAYOUT.factors(item.delta):
            gauge = torch.eye(RANK).double() + 0.5 * gaussian(RANK**2, index).view(RANK, RANK)
            factors.append((gauge @ a_RI.double(), b_OR.double() @ torch.linalg.inv(gauge)))
        turned.append(update(item.client_id, LAYOUT.flatten(factors).float()))
    state = ServerState(0, start)
    one, other = (model_change(aggregate(items, state, robust=name)) for items in (updates, turned))
    assert float((one - other).norm() / one.norm()) < 1e-4


ATTACKS = {
    "scaled": lambda delta: 1e6 * delta,
    "sign-flipped": lambda delta: -delta,
    "scaled and sign-flipped": lambda delta: -1e6 * delta,
    "noise": lambda delta: 100 * gaussian(LAYOUT.size, 31),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("read_out", ["svd", "factor-mean"])
@pytest.mark.parametrize("name", GRAM_RULES)
def test_two_of_ten_attackers_do_not_turn_the_model(name: str, read_out: str, attack: str) -> None:
    honest = honest_updates(8)
    hostile = [update(f"z{i}", ATTACKS[attack](honest[i].delta)) for i in range(2)]
    clean = model_change(aggregate(honest, read_out=read_out)) - products(start_adapter().vector)
    result = aggregate([*honest, *hostile], read_out=read_out, robust=name)
    found = model_change(result) - products(start_adapter().vector)
    assert float(found @ clean / found.norm() / clean.norm()) > 0.8
    assert 0.4 < float(found.norm() / clean.norm()) < 1.8
    if name in ("multi-krum", "similarity") and attack != "scaled":
        assert set(result.measured.silenced) >= {"z0", "z1"}
    assert not set(result.measured.silenced) & {item.client_id for item in honest} or name == "multi-krum"


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", sorted(COORDINATE_RULES))
@pytest.mark.parametrize("train", ["b", "alternate"])
def test_coordinate_rules_hold_where_one_factor_is_common(train: str, name: str, attack: str) -> None:
    honest = honest_updates(8)
    hostile = [update(f"z{i}", ATTACKS[attack](honest[i].delta)) for i in range(2)]
    axes = {"train": train, "read_out": "factor-mean"}
    start = products(start_adapter().vector)
    clean = model_change(aggregate(honest, **axes)) - start
    found = model_change(aggregate([*honest, *hostile], robust=name, **axes)) - start
    assert float(found @ clean / found.norm() / clean.norm()) > 0.8
    assert 0.3 < float(found.norm() / clean.norm()) < 1.8


def test_the_plain_mean_is_what_attackers_turn() -> None:
    """The negative control of the two tests above."""
    honest = honest_updates(8)
    hostile = [update("z0", ATTACKS["scaled and sign-flipped"](honest[0].delta))]
    start = products(start_adapter().vector)
    clean = model_change(aggregate(honest, read_out="factor-mean")) - start
    found = model_change(aggregate([*honest, *hostile], read_out="factor-mean")) - start
    assert float(found.norm() / clean.norm()) > 1e4


def test_a_rule_remembers_the_norms_of_earlier_rounds() -> None:
    first = aggregate(honest_updates(), robust="norm-clip")
    assert len(first.norms) == 1
    rows = changes(honest_updates())
    assert first.norms[0] == pytest.approx(float(rows.norm(dim=1).median()), rel=1e-5)
    small = ServerState(1, start_adapter(), norms=(first.norms[0] / 100,) * 7)
    later = aggregate(honest_updates(), small, robust="norm-clip")
    assert len(later.norms) == 8
    start = products(start_adapter().vector)
    moved = [float((model_change(result) - start).norm()) for result in (first, later)]
    assert moved[1] < 0.05 * moved[0]  # most rounds were small, so this one is taken for an attack


@pytest.mark.parametrize("read_out", ["svd", "residual"])
def test_a_single_change_that_is_shrunk_keeps_its_direction(read_out: str) -> None:
    (one,) = honest_updates(1)
    (whole,) = changes([one])
    small = ServerState(1, start_adapter(), norms=(float(whole.norm()) / 6,) * 7)  # clipped to twice that
    result = aggregate([one], small, robust="norm-clip", read_out=read_out)
    moved = LAYOUT.scale * (model_change(result) - products(start_adapter().vector))
    lost = 1 - float(moved @ whole / moved.norm() / whole.norm())
    assert lost < (1e-9 if read_out == "residual" else 0.05)  # a shrunk change has more ranks with the start
    assert 0.2 < float(moved.norm() / whole.norm()) < 0.5


# --- every rule beside every reply that validation lets through -------------------------------------------


def hostile(kind: str) -> list[ClientUpdate]:
    honest = honest_updates(4)
    one = honest[0].delta
    return {
        "huge": [*honest, update("z", torch.full((LAYOUT.size,), 1e15))],
        "huge and opposite": [*honest, update("y", 1e15 * one), update("z", -1e15 * one)],
        "tiny": [*honest, update("z", 1e-30 * one)],
        "zero": [*honest, update("z", torch.zeros(LAYOUT.size))],
        "all zero": [update(f"z{i}", torch.zeros(LAYOUT.size)) for i in range(4)],
        "duplicates": [update(f"z{i}", one) for i in range(5)],
        "one client": [honest[0]],
        "two clients that disagree": [honest[0], update("z", -one)],
        "no start left": [*honest, update("z", -start_adapter().vector)],
        "one weight takes nearly all": [*honest, update("z", -one, 1e12)],
        "weights that vanish": [update(f"c{i}", u.delta, 1e-300) for i, u in enumerate(honest)],
        "one value": [*honest, update("z", 1e6 * torch.eye(1, LAYOUT.size)[0])],
    }[kind]


KINDS = (
    "huge", "huge and opposite", "tiny", "zero", "all zero", "duplicates", "one client",
    "two clients that disagree", "no start left", "one weight takes nearly all", "weights that vanish",
    "one value",
)  # fmt: skip
RULES = [
    *({"read_out": read_out, "robust": name} for read_out in READ_OUTS for name in ["none", *GRAM_RULES]),
    *({"train": "b", "read_out": "factor-mean", "robust": name} for name in ROBUST_RULES),
    {"read_out": "local-b"},
    {"read_out": "factor-mean", "weighting": "product-norm"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", RULES, ids=lambda axes: " ".join(axes.values()))
def test_every_rule_stays_finite_beside_every_hostile_reply(axes: dict[str, str], kind: str) -> None:
    result = aggregate(hostile(kind), **axes)
    result.adapter.checked_finite()
    result.base_delta.checked_finite()
    measured = result.measured
    found = (measured.rho, measured.largest_rho, measured.kept_energy)
    numbers = [measured.delta_norm, *result.norms, *(number for number in found if number is not None)]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert result.measured.kept_energy is None or result.measured.kept_energy <= 1
    assert len(set(result.measured.silenced)) < len(hostile(kind))


@pytest.mark.parametrize("axes", RULES, ids=lambda axes: " ".join(axes.values()))
def test_clients_that_agree_are_followed_by_every_rule(axes: dict[str, str]) -> None:
    updates = hostile("duplicates")
    result = aggregate(updates, **axes)
    assert (
        result.measured.silenced == () or axes["robust"] == "multi-krum"
    )  # which of equals it drops is no matter
    if axes["read_out"] == "local-b":
        return
    delta = updates[0].delta
    if "train" in axes:
        delta = torch.where(combine.part_mask(LAYOUT, "b"), delta, 0.0)
    expected = products(start_adapter().vector + delta)
    assert float((model_change(result) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", GRAM_RULES)
def test_the_order_of_clients_changes_no_rule(name: str) -> None:
    updates = [*honest_updates(5), update("far", gaussian(LAYOUT.size, 5))]
    expected = model_change(aggregate(updates, robust=name))
    for order in itertools.islice(itertools.permutations(updates), 0, 720, 97):
        found = model_change(aggregate(list(order), robust=name))
        assert float((found - expected).norm() / expected.norm()) < 1e-6


# --- late updates -----------------------------------------------------------------------------------------
