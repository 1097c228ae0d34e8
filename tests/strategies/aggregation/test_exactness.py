"""What the methods promise of a whole model, and two published mistakes these tests would have caught."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedllm.adapters.algebra import Product, decompose
from fedllm.adapters.base_delta import adapter_with_base_delta
from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.config.keys import PRESETS
from fedllm.messages import ClientUpdate
from fedllm.plan.aggregation import AggregationRule
from fedllm.runs.checkpoint import ServerState
from strategies.aggregation import combine

RANK, WEIGHTS = 3, (1.0, 2.0, 3.0, 4.0)


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layout_of(num_in: int, num_out: int) -> AdapterLayout:
    return AdapterLayout((LoraMatrix("only", num_in, num_out),), RANK, 6.0, "f")


def updates_of(layout: AdapterLayout, part: str = "both", size: float = 0.2) -> list[ClientUpdate]:
    mask = combine.part_mask(layout, part)
    return [
        ClientUpdate(
            rank=RANK,
            client_id=f"c{index}",
            round_num=1,
            delta=torch.where(mask, size * gaussian(layout.size, seed=index), 0.0),
            weight=weight,
            num_tokens=1,
            train_loss=0.5,
        )
        for index, weight in enumerate(WEIGHTS)
    ]


def aggregate(
    state: ServerState, updates: list[ClientUpdate], rule: AggregationRule, round_num: int = 1
) -> combine.Aggregate:
    layout = state.adapter.layout
    mixture = combine.RoundUpdates(
        rule, state, trained=rule.trained_in(round_num), fresh=lambda: initial_adapter(layout, round_num)
    )
    for item in updates:
        mixture = combine.add(mixture, item)
    return combine.finish(mixture)


def product(layout: AdapterLayout, vector: torch.Tensor) -> torch.Tensor:
    ((a_RI, b_OR),) = layout.factors(vector)
    return b_OR.double() @ a_RI.double()


def mean_product(start: AdapterState, updates: list[ClientUpdate]) -> torch.Tensor:
    total = sum(item.weight for item in updates)
    products = (product(start.layout, start.vector + item.delta) for item in updates)
    return sum(item.weight / total * one for item, one in zip(updates, products, strict=True))


def linear(weight_OI: torch.Tensor) -> nn.Module:
    module = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    module.weight.data = weight_OI.float()
    return module


def conv1d(weight_OI: torch.Tensor) -> nn.Module:
    """GPT-2's linear layer, which holds its weight the other way round."""
    module = Conv1D(weight_OI.shape[0], weight_OI.shape[1])
    module.weight.data, module.bias.data = weight_OI.T.contiguous().float(), torch.zeros(weight_OI.shape[0])
    return module


# --- exact read-outs on the layers of real models --------------------------------------------------------


@pytest.mark.parametrize("make_layer", [linear, conv1d])
@pytest.mark.parametrize(("num_in", "num_out"), [(20, 12), (12, 20), (16, 16)])
@pytest.mark.parametrize("preset", ["fedex", "flora", "ffa", "rolora"])
def test_a_layer_with_base_delta_computes_the_clients_mean(
    preset: str, num_in: int, num_out: int, make_layer: Callable[[torch.Tensor], nn.Module]
) -> None:
    """I1, I2, I3: (W + s base delta) x + s B A x = W x + s M x, wherever a transposed factor cannot hide."""
    layout = layout_of(num_in, num_out)
    start = AdapterState(layout, 0.3 * gaussian(layout.size, seed=50))
    train, read_out, _, _ = PRESETS[preset]
    rule = AggregationRule(train=train, read_out=read_out)
    updates = updates_of(layout, rule.trained_in(1))
    result = aggregate(ServerState(0, start), updates, rule)
    weight, x = gaussian(num_out, num_in, seed=60).double(), gaussian(7, num_in, seed=61)
    ((b_ON, a_NI),) = result.base_delta.factors
    layer = make_layer(weight + layout.scale * b_ON.double() @ a_NI.double())
    ((a_RI, b_OR),) = layout.factors(result.adapter.vector)
    found = layer(x) + layout.scale * (x @ a_RI.T @ b_OR.T)
    expected = make_layer(weight + layout.scale * mean_product(start, updates))(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_averaging_both_factors_is_not_exact() -> None:
    """I5: the negative control. Without it the tests above could pass on clients that hardly differ."""
    layout = layout_of(20, 12)
    start = AdapterState(layout, 0.3 * gaussian(layout.size, seed=50))
    updates = updates_of(layout)
    result = aggregate(ServerState(0, start), updates, AggregationRule(read_out="factor-mean"))
    mean = mean_product(start, updates)
    assert float((product(layout, result.adapter.vector) - mean).norm() / mean.norm()) > 0.1


@pytest.mark.parametrize("preset", ["fedex", "flora"])
def test_a_published_adapter_holds_the_base_delta(preset: str) -> None:
    """The PEFT adapter for the base model everybody has does what the clients' changed base does."""
    layout = AdapterLayout((LoraMatrix("a", 20, 12), LoraMatrix("b", 6, 9)), RANK, 6.0, "f")
    state = ServerState(0, initial_adapter(layout, 0))
    for round_num in (1, 2):
        result = aggregate(state, updates_of(layout), AggregationRule(read_out=PRESETS[preset][1]), round_num)
        state = ServerState(round_num, result.adapter, base_delta=result.base_delta)
    whole = adapter_with_base_delta(state.adapter, state.base_delta)
    assert whole.layout.rank == RANK + max(b_ON.shape[1] for b_ON, _ in state.base_delta.factors)
    pairs = zip(
        whole.layout.factors(whole.vector),
        layout.factors(state.adapter.vector),
        state.base_delta.factors,
        strict=True,
    )
    for (a, b), (a_RI, b_OR), (b_ON, a_NI) in pairs:
        expected = layout.scale * (b_OR.double() @ a_RI.double() + b_ON.double() @ a_NI.double())
        torch.testing.assert_close(whole.layout.scale * b.double() @ a.double(), expected)


# --- two published mistakes, in our own words ------------------------------------------------------------


def test_a_transposed_residual_would_be_worse_than_none() -> None:
    """FedEx-LoRA's public aggregator adds the residual of `nn.Linear` transposed; square layers hide it."""
    layout = layout_of(16, 16)
    start = AdapterState(layout, 0.3 * gaussian(layout.size, seed=50))
    updates = updates_of(layout, size=0.3)
    result = aggregate(ServerState(0, start), updates, AggregationRule(read_out="residual"))
    mean, adapter = mean_product(start, updates), product(layout, result.adapter.vector)
    ((b_ON, a_NI),) = result.base_delta.factors
    residual = b_ON.double() @ a_NI.double()
    errors = {
        "ours": float((adapter + residual - mean).norm()),
        "averaged factors": float((adapter - mean).norm()),
        "transposed": float((adapter + residual.T - mean).norm()),
    }
    assert errors["ours"] < 1e-6 * float(mean.norm())
    assert errors["transposed"] > errors["averaged factors"] > 0.1 * float(mean.norm())


def test_a_misspelt_sum_would_keep_the_first_client_alone() -> None:
    """FLoRA's public FedIT baseline sums into a name that nothing reads: p_0 * client_0 is what remains."""

    def misspelt(vectors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        kept = weights[0] * vectors[0]
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            _kpet = kept + weight * vector
        return kept

    layout = layout_of(4, 5)
    start = AdapterState(layout, torch.zeros(layout.size))
    updates = [
        ClientUpdate(
            rank=RANK,
            client_id=f"c{value}",
            round_num=1,
            delta=torch.full((layout.size,), float(value)),
            weight=1.0,
            num_tokens=1,
            train_loss=0.5,
        )
        for value in (1, 2, 3, 4)
    ]
    found = aggregate(ServerState(0, start), updates, AggregationRule(read_out="factor-mean"))
    assert found.adapter.vector.unique().tolist() == [2.5]
    assert misspelt([item.delta for item in updates], [0.25] * 4).unique().tolist() == [0.25]


# --- one plain gradient step of every client is one step on all rows -------------------------------------


def rows_of(seed: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussian(number, 10, seed=seed).double(), gaussian(number, 8, seed=seed + 1).double()


def loss_of(a_RI: torch.Tensor, b_OR: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean over rows, of a model that is not linear in its adapter."""
    x, y = rows
    return (torch.tanh(x @ a_RI.T @ b_OR.T) - y).square().sum(dim=1).mean()


def gradient_step(
    layout: AdapterLayout, vector: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], part: str
) -> torch.Tensor:
    """Return the delta [P] of one full-batch step of gradient descent on the trained part."""
    theta = vector.double().requires_grad_(True)
    ((a_RI, b_OR),) = layout.factors(theta)
    (gradient,) = torch.autograd.grad(loss_of(a_RI, b_OR, rows), theta)
    return torch.where(combine.part_mask(layout, part), -0.1 * gradient, 0.0).float()


@pytest.mark.parametrize("train", ["b", "alternate"])
def test_one_gradient_step_each_is_one_step_on_the_pooled_rows(train: str) -> None:
    """I8: with weights n_i / n, FFA-LoRA and RoLoRA equal the centralised step, round after round."""
    layout = AdapterLayout((LoraMatrix("only", 10, 8),), RANK, 6.0, "f")
    rows = [rows_of(10 * index, number) for index, number in enumerate((2, 5, 9))]
    pooled = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
    rule = AggregationRule(train=train, read_out="factor-mean")
    state = ServerState(0, initial_adapter(layout, 3))
    central = state.adapter.vector
    for round_num in (1, 2, 3, 4):
        part = rule.trained_in(round_num)
        updates = [
            ClientUpdate(
                rank=RANK,
                client_id=f"c{index}",
                round_num=round_num,
                delta=gradient_step(layout, state.adapter.vector, own, part),
                weight=float(len(own[0])),
                num_tokens=1,
                train_loss=0.5,
            )
            for index, own in enumerate(rows)
        ]
        state = ServerState(round_num, aggregate(state, updates, rule, round_num).adapter)
        central = central + gradient_step(layout, central, pooled, part)
        torch.testing.assert_close(state.adapter.vector, central, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("flora", "fedsa")])
def test_one_client_alone_trains_as_if_there_were_no_server(preset: str) -> None:
    """I7: for every method that does not restart, K = 1 changes no bit of what the client would have done."""
    layout = AdapterLayout((LoraMatrix("only", 10, 8),), RANK, 6.0, "f")
    train, read_out, weighting, _ = PRESETS[preset]
    rule = AggregationRule(train=train, read_out=read_out, weighting=weighting or "examples")
    rows, state = rows_of(0, 7), ServerState(0, initial_adapter(layout, 3))
    central = state.adapter.vector
    for round_num in range(1, 5):
        part = rule.trained_in(round_num)
        delta = gradient_step(layout, state.adapter.vector, rows, part)
        update = ClientUpdate(
            client_id="only",
            rank=RANK,
            round_num=round_num,
            delta=delta,
            weight=7.0,
            num_tokens=1,
            train_loss=0.5,
        )
        result = aggregate(state, [update], rule, round_num)
        state = ServerState(round_num, result.adapter, base_delta=result.base_delta)
        central = central + gradient_step(layout, central, rows, part)
        assert torch.equal(state.adapter.vector, central)
        assert state.base_delta.size == 0


def test_an_svd_of_b_alone_never_leaves_the_first_row_space() -> None:
    """I10: FedSVD under plain gradient descent is FFA-LoRA with orthonormal rows of A, in another basis."""
    rows = [rows_of(10 * index, 6) for index in range(3)]
    first, _ = torch.linalg.qr(gaussian(10, RANK, seed=1).double())
    frozen_a, frozen_b = first.T, torch.zeros(8, RANK).double()
    turned_a, turned_b = frozen_a, frozen_b

    def mean_step(a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
        leaf = b_OR.clone().requires_grad_(True)
        gradients = [torch.autograd.grad(loss_of(a_RI, leaf, own), leaf)[0] for own in rows]
        return b_OR - 0.5 * sum(gradients) / len(rows)

    for _ in range(10):
        frozen_b, turned_b = mean_step(frozen_a, frozen_b), mean_step(turned_a, turned_b)
        u, s, v = decompose(Product(turned_b[None], turned_a[None]))
        turned_a, turned_b = v[0], u[0] * s[0]
        torch.testing.assert_close(turned_b @ turned_a, frozen_b @ frozen_a, rtol=1e-9, atol=1e-12)
        outside = turned_a - turned_a @ first @ first.T
        assert float(outside.norm()) < 1e-12
