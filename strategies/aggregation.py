"""Client updates become one adapter: the exact weighted mean of their products, read out at rank R.

With client adapters (A_i, B_i) and normalised weights p_i, the mean a federation wants is the matrix
M = sum p_i B_i A_i. `factor-mean` (FedIT, arXiv 2305.05644) returns the means of the factors, whose product
is not M; `svd` (FlexLoRA, arXiv 2402.11505) returns the best rank-R approximation of M. Both report

    rho         = ||M - mean(B) mean(A)||_F / ||M - B_0 A_0||_F    the error of averaging factors
    kept energy = the share of ||M||_F^2 that the rank-R read-out keeps

The common scale alpha / R multiplies every term alike and cancels in all of these.
Tensor suffixes: P flat adapter, O output feature, I input feature, R rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedllm.adapters import algebra
from fedllm.adapters.layout import AdapterState, at_rank, with_rank
from fedllm.types import ClientUpdate


@dataclass(frozen=True, eq=False)
class Mixture:
    """Running weighted sums over clients, in float64; `add` in a fixed order gives fixed bits."""

    start: AdapterState
    total_weight: float
    sum_P: torch.Tensor  # weighted sum of client adapters
    products: tuple[algebra.Product, ...]  # weighted sum of B_i A_i, per matrix
    last_P: torch.Tensor | None = None  # the adapter of the only client, while there is one
    num_clients: int = 0


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The new adapter and what its read-out cost."""

    adapter: AdapterState
    rho: float
    kept_energy: float
    delta_norm: float  # ||M - M_0||_F over all matrices, the size of the round's change


def init(start: AdapterState) -> Mixture:
    """Return the empty mixture of a round that starts from `start`."""
    products = tuple(algebra.Product(m.out_features, m.in_features) for m in start.layout.matrices)
    return Mixture(start, 0.0, torch.zeros(start.layout.size, dtype=torch.float64), products)


def add(mixture: Mixture, update: ClientUpdate) -> Mixture:
    """Return the mixture with one more client in it.

    The factors of a bounded number of clients are kept; beyond it they are merged without loss.
    """
    full = mixture.start.layout
    own = at_rank(full, update.rank)
    adapter_P = with_rank(mixture.start.vector, full, update.rank) + update.delta
    factors = own.factors(adapter_P)
    adapter_P = with_rank(adapter_P, own, full.rank)
    return replace(
        mixture,
        total_weight=mixture.total_weight + update.weight,
        sum_P=torch.add(mixture.sum_P, adapter_P, alpha=update.weight),
        products=tuple(
            product.plus(update.weight, b_OR, a_RI)
            for product, (a_RI, b_OR) in zip(mixture.products, factors, strict=True)
        ),
        last_P=adapter_P,
        num_clients=mixture.num_clients + 1,
    )


def finish(mixture: Mixture, read_out: str) -> Aggregate:
    """Return the aggregate of at least one client by the named read-out: "svd" or "factor-mean"."""
    layout = mixture.start.layout
    mean_P = mixture.sum_P / mixture.total_weight
    exact = [product.times(1 / mixture.total_weight) for product in mixture.products]
    residual = _distance(exact, layout.factors(mean_P))
    change = _distance(exact, layout.factors(mixture.start.vector))
    truncated = [
        algebra.truncate(product, layout.rank, a_RI)
        for product, (a_RI, _) in zip(exact, layout.factors(mixture.start.vector), strict=True)
    ]
    kept, total = sum(t.kept for t in truncated), sum(t.total for t in truncated)
    # One client's own factors are already its exact read-out; refactoring them would only change gauge.
    if read_out in ("factor-mean", "local-b") or mixture.num_clients == 1:
        vector = mean_P if mixture.num_clients > 1 else mixture.last_P
        assert vector is not None
        adapter = AdapterState(layout, vector.float())
    else:
        adapter = AdapterState(layout, layout.flatten([(t.a_RI, t.b_OR) for t in truncated]))
    return Aggregate(
        adapter.checked_finite(),
        rho=residual / change if change else 0.0,
        kept_energy=kept / total if total else 1.0,
        delta_norm=change * layout.scale,
    )


def _distance(
    products: Sequence[algebra.Product], factors: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """Return the Frobenius distance between M and B A over all matrices taken together."""
    return math.sqrt(
        sum(
            algebra.squared_distance(
                product, algebra.Product(product.out_features, product.in_features, ((1.0, b_OR, a_RI),))
            )
            for product, (a_RI, b_OR) in zip(products, factors, strict=True)
        )
    )
