"""What tests of aggregation share: six clients of two matrices, and dense float64 arithmetic."""

from typing import Any

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.messages import ClientUpdate
from fedllm.plan.aggregation import AggregationRule
from fedllm.runs.checkpoint import ServerState
from strategies.aggregation import combine as combining
from strategies.aggregation.combine import Aggregate, RoundUpdates

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
    return RoundUpdates(rule, state, trained=trained, fresh=lambda: initial_adapter(LAYOUT, 7))


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


def only(part: str, delta: torch.Tensor) -> torch.Tensor:
    return torch.where(combining.part_mask(LAYOUT, part), delta, 0.0)
