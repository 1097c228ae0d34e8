"""Server optimizers against their published recurrences in plain Python, and the gauge they work in."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.config.run_config import KEYS
from fedllm.messages import ClientUpdate
from fedllm.plan.aggregation import AggregationRule, ServerOptimizer
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import OptimizerState
from strategies.aggregation import combine
from strategies.aggregation.optimizers import rewrite_in_basis, step

OPTIMIZERS = tuple(KEYS["aggregation.optimizer"].words)
RANK, BETA, BETA2, TAU = 3, 0.8, 0.95, 1e-2
LAYOUT = AdapterLayout((LoraMatrix("wide", 20, 12), LoraMatrix("tall", 9, 17)), RANK, 6.0, "f")
DELTAS = ((0.3, -0.02, 0.0), (-0.1, 0.04, 1e-3), (0.2, 0.0, -0.5), (0.0, 0.0, 0.0), (0.05, -0.3, 0.1))


def gaussian(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def products(vector: torch.Tensor) -> list[torch.Tensor]:
    return [b_OR.double() @ a_RI.double() for a_RI, b_OR in LAYOUT.factors(vector)]


def recurrence(name: str, deltas: list[float], rate: float) -> list[float]:
    """Return the steps of one value, as the papers write them."""
    m, v, steps = 0.0, TAU**2, []
    for delta in deltas:
        if name == "fedavg":
            steps.append(rate * delta)
        elif name == "fedavgm":
            m = BETA * m + delta
            steps.append(rate * m)
        elif name == "nesterov":
            m = BETA * m + delta
            steps.append(rate * (delta + BETA * m))
        else:
            m = BETA * m + (1 - BETA) * delta
            if name == "fedadam":
                v = BETA2 * v + (1 - BETA2) * delta**2
            elif name == "fedyogi":
                v = v - (1 - BETA2) * delta**2 * math.copysign(1.0, v - delta**2)
            else:
                v = v + delta**2
            steps.append(rate * m / (math.sqrt(v) + TAU))
    return steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_follows_its_published_recurrence(name: str) -> None:
    optimizer = ServerOptimizer(
        name=name, learning_rate=0.5, momentum=BETA, second_moment=BETA2, adaptivity=TAU
    )
    state, everything, steps = OptimizerState(), torch.ones(3, dtype=torch.bool), []
    for values in DELTAS:
        state, moved = step(optimizer, state, torch.tensor(values), everything)
        steps.append(moved)
    for column, deltas in enumerate(zip(*DELTAS, strict=True)):
        found = [float(moved[column]) for moved in steps]
        assert found == pytest.approx(recurrence(name, list(deltas), 0.5), rel=1e-5, abs=1e-8)
    assert state.num_steps == len(DELTAS)


@pytest.mark.parametrize("name", ["fedavgm", "nesterov"])
def test_momentum_is_torchs_sgd_on_the_negative_change(name: str) -> None:
    optimizer = ServerOptimizer(name=name, learning_rate=0.7, momentum=0.9)
    theta, state = torch.zeros(3, requires_grad=True), OptimizerState()
    sgd = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=name == "nesterov")
    ours = torch.zeros(3)
    for values in DELTAS:
        theta.grad = -torch.tensor(values)
        sgd.step()
        state, moved = step(optimizer, state, torch.tensor(values), torch.ones(3, dtype=torch.bool))
        ours = ours + moved
        torch.testing.assert_close(ours, theta.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_does_not_move_and_is_not_forgotten(name: str) -> None:
    optimizer = ServerOptimizer(name=name, momentum=BETA, second_moment=BETA2, adaptivity=TAU)
    first, both = torch.tensor([True, False]), torch.ones(2, dtype=torch.bool)
    state, _ = step(optimizer, OptimizerState(), torch.tensor([0.3, 0.3]), both)
    after, moved = step(optimizer, state, torch.tensor([0.2, 0.2]), first)
    assert moved[0] != 0
    assert moved[1] == 0
    assert (after.first[1], after.second[1]) == (state.first[1], state.second[1])


def test_published_learning_rates_stand_in_for_zero() -> None:
    rates = {name: ServerOptimizer(name=name).rate for name in OPTIMIZERS}
    assert rates == {
        "fedavg": 1.0, "fedavgm": 1.0, "nesterov": 0.7, "fedadam": 1e-3, "fedyogi": 1e-3, "fedadagrad": 1e-3
    }  # fmt: skip
    assert [name for name in OPTIMIZERS if ServerOptimizer(name=name).is_plain] == ["fedavg"]
    assert not ServerOptimizer(learning_rate=0.5).is_plain


# --- the gauge ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**20), st.floats(-3, 3))
def test_aligning_changes_no_product_and_brings_a_gauge_back(seed: int, log_size: float) -> None:
    start = gaussian(LAYOUT.size, seed)
    turned = []
    for index, (a_RI, b_OR) in enumerate(LAYOUT.factors(start)):
        gauge = torch.eye(3).double() * 10**log_size + 0.2 * gaussian(9, seed + index).view(3, 3).double()
        turned.append((gauge @ a_RI.double(), b_OR.double() @ torch.linalg.pinv(gauge)))
    vector = LAYOUT.flatten(turned).float()
    found = rewrite_in_basis(LAYOUT, vector, start)
    for one, other in zip(products(found), products(vector), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    for (a_found, _), (a_RI, _) in zip(LAYOUT.factors(found), LAYOUT.factors(start), strict=True):
        values = torch.linalg.svdvals(a_RI)
        if float(values[-1] / values[0]) > 0.11:  # less is raised to a tenth, so that B stays in bounds
            torch.testing.assert_close(a_found, a_RI, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", [torch.zeros(LAYOUT.size), gaussian(LAYOUT.size, 1)])
@pytest.mark.parametrize("vector", [torch.zeros(LAYOUT.size), gaussian(LAYOUT.size, 2)])
def test_aligning_never_loses_a_product(start: torch.Tensor, vector: torch.Tensor) -> None:
    found = rewrite_in_basis(LAYOUT, vector, start)
    for one, other in zip(products(found), products(vector), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def updates_of(seed: int, size: float, start: AdapterState, target: torch.Tensor) -> list[ClientUpdate]:
    """Return three clients that move from the start towards the same target, each with its own noise."""
    return [
        ClientUpdate(
            rank=RANK,
            client_id=f"c{index}",
            round_num=1,
            delta=size * (target - start.vector) + 0.01 * gaussian(LAYOUT.size, 10 * seed + index),
            weight=1.0,
            num_tokens=1,
            train_loss=0.5,
        )
        for index in range(3)
    ]


def aggregate(state: ServerState, updates: list[ClientUpdate], **axes: Any) -> combine.Aggregate:
    rule = AggregationRule(**axes)
    mixture = combine.RoundUpdates(
        rule, state, trained=rule.trained_in(state.round_num + 1), fresh=lambda: state.adapter
    )
    for item in updates:
        mixture = combine.add(mixture, item)
    return combine.finish(mixture)


def after(state: ServerState, result: combine.Aggregate) -> ServerState:
    return ServerState(state.round_num + 1, result.adapter, optimizer=result.optimizer)


def test_fedavg_and_a_first_momentum_step_keep_the_read_out() -> None:
    start = initial_adapter(LAYOUT, 0)
    state = ServerState(0, start)
    updates = updates_of(0, 0.5, start, gaussian(LAYOUT.size, 5))
    plain = aggregate(state, updates)
    assert plain.optimizer.num_steps == 0
    momentum = aggregate(state, updates, optimizer=ServerOptimizer(name="fedavgm"))
    for one, other in zip(products(momentum.adapter.vector), products(plain.adapter.vector), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.equal(momentum.adapter.vector, plain.adapter.vector)


@pytest.mark.parametrize("read_out", ["svd", "factor-mean", "projection"])
def test_momentum_goes_on_in_the_direction_of_the_first_round(read_out: str) -> None:
    """In the balanced gauge of an SVD, A shrinks in the first round, and momentum would turn the sign."""
    start, optimizer = initial_adapter(LAYOUT, 0), ServerOptimizer(name="fedavgm")
    target = start.vector + 0.1 * gaussian(LAYOUT.size, 5)
    state = ServerState(0, start)
    state = after(
        state, aggregate(state, updates_of(1, 1.0, start, target), read_out=read_out, optimizer=optimizer)
    )
    first = torch.cat([matrix.flatten() for matrix in products(state.adapter.vector)])
    still = [
        ClientUpdate(
            rank=RANK,
            client_id=f"c{index}", round_num=2, delta=torch.zeros(LAYOUT.size), weight=1.0, num_tokens=1,
            train_loss=0.5,
        )
        for index in range(3)
    ]  # fmt: skip
    state = after(state, aggregate(state, still, read_out=read_out, optimizer=optimizer))
    second = torch.cat([matrix.flatten() for matrix in products(state.adapter.vector)])
    assert float(first @ second / first.norm() / second.norm()) > 0.8
    assert 1.5 < float(second.norm() / first.norm()) < 3.7  # 1.9 of each factor that moved, 1.9^2 of both


def rotated(vector: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return the adapter turned by the orthogonal matrix that brings it nearest to the start (Procrustes)."""
    turned = []
    for (a_RI, b_OR), (a_0, b_0) in zip(LAYOUT.factors(vector), LAYOUT.factors(start), strict=True):
        u, _, v = torch.linalg.svd(b_OR.T @ b_0 + a_RI @ a_0.T)
        turned.append(((u @ v).T @ a_RI, b_OR @ (u @ v)))
    return LAYOUT.flatten(turned).float()


def test_a_rotation_would_have_momentum_undo_the_first_round() -> None:
    """The negative control of the gauge: the same two rounds as above, aligned by a rotation only."""
    start = initial_adapter(LAYOUT, 0)
    target = start.vector + 0.01 * gaussian(LAYOUT.size, 5)
    read_out = aggregate(ServerState(0, start), updates_of(1, 1.0, start, target)).adapter.vector
    cosines = {}
    for name, align in (("rotation", rotated), ("ours", lambda v, s: rewrite_in_basis(LAYOUT, v, s))):
        first = align(read_out, start.vector)
        second = first + 0.9 * (first - start.vector)  # momentum, where the clients then change nothing
        one, two = (torch.cat([m.flatten() for m in products(vector)]) for vector in (first, second))
        cosines[name] = float(one @ two / one.norm() / two.norm())
    assert cosines["rotation"] < 0
    assert cosines["ours"] > 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rounds_that_change_nothing_move_nothing(optimizer: str) -> None:
    """A read-out by SVD comes in another gauge; that alone must not count as a change."""
    start = AdapterState(LAYOUT, initial_adapter(LAYOUT, 0).vector + 0.3 * gaussian(LAYOUT.size, 9))
    state = ServerState(0, start)
    for _ in range(4):
        updates = [
            ClientUpdate(
                rank=RANK,
                client_id=f"c{index}", round_num=1, delta=torch.zeros(LAYOUT.size), weight=1.0, num_tokens=1,
                train_loss=0.5,
            )
            for index in range(2)
        ]  # fmt: skip
        state = after(state, aggregate(state, updates, optimizer=ServerOptimizer(name=optimizer)))
    for one, other in zip(products(state.adapter.vector), products(start.vector), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "fedavg"])
def test_alternating_rounds_never_move_the_factor_that_is_frozen(name: str) -> None:
    state = ServerState(0, AdapterState(LAYOUT, gaussian(LAYOUT.size, 1)))
    axes = {"train": "alternate", "read_out": "factor-mean", "optimizer": ServerOptimizer(name=name)}
    for round_num in range(1, 5):
        frozen = combine.part_mask(LAYOUT, "a" if round_num % 2 else "b")
        before = state.adapter.vector
        updates = updates_of(round_num, 0.1, state.adapter, torch.zeros(LAYOUT.size))
        state = after(state, aggregate(state, updates, **axes))
        assert torch.equal(state.adapter.vector[frozen], before[frozen])
        assert not torch.equal(state.adapter.vector[~frozen], before[~frozen])
