"""What a round holds of its clients: the latest as they came, the earlier ones as sums.

Written in changes (a_i, b_i) of the factors since the start of the round, the mean of the products is

    M = B' A' + R,   R = sum p_i (b_i - b')(a_i - a')

with a', b' the mean changes. Held clients give R as factors, K - 1 of them, since the last is what the others
sum up to. Once their factors take more room than one dense float64 copy of the adapted matrices, they are
folded into C = sum p_i b_i a_i, and R = C - b' a'; so memory does not grow with the number of clients. Where
one factor is common to all clients there is no R, and only one vector is summed.
Tensor suffixes: K clients, L matrices of one shape, P flat adapter, R rank, O output, I input feature.
"""

from dataclasses import dataclass, replace

import torch

from fedllm.adapters.algebra import Product
from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.shapes import ShapeGroup, parts_of, shape_groups, stack_factors

WORKSPACE = 1 << 28  # bytes of float64 factors that one batched operation takes at most


@dataclass(frozen=True, eq=False)
class Held:
    """One client as it came: its change [P] at the rank of the run, its own rank, and its weight."""

    client_id: str
    weight: float
    rank: int
    delta: torch.Tensor


@dataclass(frozen=True, eq=False)
class Sums:
    """Weighted sums over the clients that are no longer held; `products` is C, one [L, O, I] per shape."""

    weight: float
    rank_weights: torch.Tensor  # [R]: the weight of the clients that train a column
    delta: torch.Tensor  # [P]
    products: tuple[torch.Tensor, ...]


def empty_sums(layout: AdapterLayout, *, with_products: bool) -> Sums:
    """Return sums over nobody."""
    shapes = [(len(g.indices), g.out_features, g.in_features) for g in shape_groups(layout)]
    return Sums(
        0.0,
        torch.zeros(layout.rank, dtype=torch.float64),
        torch.zeros(layout.size, dtype=torch.float64),
        tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes) if with_products else (),
    )


def most_held(layout: AdapterLayout, *, with_products: bool) -> int:
    """Return how many clients are held before they are folded: as many as take the room of the sums."""
    if not with_products:
        return 1
    entries = sum(m.out_features * m.in_features for m in layout.matrices)
    return max(1, 2 * entries // layout.size)  # 8 bytes an entry, 4 bytes a value of a held client


def rank_weights(held: tuple[Held, ...], weights_K: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the weight [R] of the clients that train each of the first `rank` columns."""
    ranks_K = torch.tensor([client.rank for client in held])
    trains_KR = torch.arange(rank)[None, :] < ranks_K[:, None]
    return (weights_K[:, None] * trains_KR).sum(dim=0)


def fold(sums: Sums, layout: AdapterLayout, held: tuple[Held, ...]) -> Sums:
    """Return the sums with the held clients in them."""
    weights_K = torch.tensor([client.weight for client in held], dtype=torch.float64)
    products = []
    for group, before in zip(shape_groups(layout) if sums.products else (), sums.products, strict=True):
        after = torch.empty_like(before)
        for part in parts_of(group, matrices_at_once(group, layout.rank * len(held))):
            stack = weighted_products(layout, held, weights_K, group.indices[part])
            assert stack.right is not None
            after[part] = torch.baddbmm(before[part], stack.left, stack.right)
        products.append(after)
    return replace(
        sums,
        weight=sums.weight + float(weights_K.sum()),
        rank_weights=sums.rank_weights + rank_weights(held, weights_K, layout.rank),
        delta=sums.delta + weighted_delta(held, weights_K),
        products=tuple(products),
    )


def matrices_at_once(group: ShapeGroup, width: int) -> int:
    """Return how many matrices of a group fit the workspace, as stacks of `width` columns or as matrices."""
    numbers = min(width * (group.out_features + group.in_features), group.out_features * group.in_features)
    return max(1, WORKSPACE // (8 * max(1, numbers)))


def weighted_delta(held: tuple[Held, ...], weights_K: torch.Tensor) -> torch.Tensor:
    """Return sum w_i delta_i [P] in float64."""
    total_P = torch.zeros(len(held[0].delta), dtype=torch.float64)
    for client, weight in zip(held, weights_K.tolist(), strict=True):
        total_P.add_(client.delta, alpha=weight)
    return total_P


def weighted_products(
    layout: AdapterLayout, held: tuple[Held, ...], weights_K: torch.Tensor, indices: tuple[int, ...]
) -> Product:
    """Return sum w_i b_i a_i of the named matrices, as factors."""
    a_LKRI, b_LKOR = stack_factors(layout, [client.delta for client in held], indices)
    return _side_by_side(b_LKOR * weights_K[:, None, None], a_LKRI)


def residual(
    layout: AdapterLayout,
    held: tuple[Held, ...],
    weights_K: torch.Tensor,
    indices: tuple[int, ...],
    mean_LOR: torch.Tensor,
) -> Product:
    """Return R = sum w_i b_i a_i - b' a' of the named matrices, as factors; `mean_LOR` is b' = sum w_i b_i.

    Every term is as small as the disagreement of the clients, so clients that agree leave no rounding noise.
    """
    a_LKRI, b_LKOR = stack_factors(layout, [client.delta for client in held], indices)
    b_LKOR = (b_LKOR - mean_LOR[:, None]) * weights_K[:, None, None]
    if abs(float(weights_K.sum()) - 1) < 1e-12:  # the b_i - b' sum to zero: any constant may leave the a_i
        a_LKRI, b_LKOR = a_LKRI[:, :-1] - a_LKRI[:, -1:], b_LKOR[:, :-1]
    return _side_by_side(b_LKOR, a_LKRI)


def _side_by_side(b_LKOR: torch.Tensor, a_LKRI: torch.Tensor) -> Product:
    return Product(b_LKOR.transpose(1, 2).flatten(2), a_LKRI.flatten(1, 2))
