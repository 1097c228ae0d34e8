"""The mean of a round's products, from updates that are held as they came or folded into sums.

Written in changes (a_i, b_i) of the factors since the start of the round, the mean of the products is

    M = B' A' + R,   R = sum p_i (b_i - b')(a_i - a')

with a', b' the mean changes. Held updates give R as factors, K - 1 of them, since the last is minus the sum
of the others. Once their factors take more room than one dense float64 copy of the adapted matrices, they are
folded into C = sum p_i b_i a_i, and R = C - b' a'; so memory does not grow with the number of clients. Where
one factor is common to all clients there is no R, and only one vector is summed.
Tensor suffixes: K clients, L matrices of one shape, P flat adapter, R rank, O output, I input feature.
"""

import math
from dataclasses import dataclass, replace

import torch

from fedllm.adapters.algebra import Product
from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.shapes import ShapeGroup, chunks_of, shape_groups, stack_factors
from strategies.aggregation.devices import product_device

WORKSPACE = 1 << 23  # bytes of float64 that one batched operation works on: what a cache holds
ROUNDING = 1e-12  # weights that differ from 1 by less than this sum to 1: float64 leaves about 1e-16 each


@dataclass(frozen=True, eq=False)
class HeldUpdate:
    """One client's update as it came: its change [P] at the rank of the run, its own rank, and its weight."""

    client_id: str
    weight: float
    rank: int
    delta: torch.Tensor


@dataclass(frozen=True, eq=False)
class FoldedSums:
    """Weighted sums over the updates that are no longer held; `products` is C, one [L, O, I] per shape."""

    weight: float
    rank_weights: torch.Tensor  # [R]: the weight of the clients that train a column
    delta: torch.Tensor  # [P]
    products: tuple[torch.Tensor, ...]  # on the device that forms them


def empty_sums(layout: AdapterLayout, *, with_products: bool) -> FoldedSums:
    """Return sums over nobody."""
    shapes = [(len(g.indices), g.out_features, g.in_features) for g in shape_groups(layout)]
    columns = layout.rank * num_holdable(layout, with_products=with_products)
    device = product_device(columns, 8 * sum(map(math.prod, shapes)))
    return FoldedSums(
        0.0,
        torch.zeros(layout.rank, dtype=torch.float64),
        torch.zeros(layout.size, dtype=torch.float64),
        tuple(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes) if with_products else (),
    )


def num_holdable(layout: AdapterLayout, *, with_products: bool) -> int:
    """Return how many updates are held before they are folded: as many as take the room of the sums."""
    if not with_products:
        return 1
    entries = sum(m.out_features * m.in_features for m in layout.matrices)
    return max(1, 2 * entries // layout.size)  # 8 bytes an entry, 4 bytes a value of a held update


def rank_weights(held: tuple[HeldUpdate, ...], weights_K: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the weight [R] of the clients that train each of the first `rank` columns."""
    ranks_K = torch.tensor([update.rank for update in held])
    trains_KR = torch.arange(rank)[None, :] < ranks_K[:, None]
    return (weights_K[:, None] * trains_KR).sum(dim=0)


def fold(sums: FoldedSums, layout: AdapterLayout, held: tuple[HeldUpdate, ...]) -> FoldedSums:
    """Return the sums with the held updates in them, in the order in which they came."""
    weights_K = torch.tensor([update.weight for update in held], dtype=torch.float64)
    deltas = [update.delta for update in held]
    products = []
    for group, before in zip(shape_groups(layout) if sums.products else (), sums.products, strict=True):
        after = torch.empty_like(before)
        for part in chunks_of(group, matrices_at_once(group, layout.rank * len(held))):
            a_LKRI, b_LOKR = stack_factors(layout, deltas, group.indices[part], before.device)
            b_LOKR.mul_(weights_K[:, None].to(before.device))
            # Side by side the factors of all clients are one product, and the sum over them is free.
            torch.baddbmm(before[part], b_LOKR.flatten(2), a_LKRI.flatten(1, 2), out=after[part])
        products.append(after)
    delta_P = sums.delta.clone()
    for delta, weight in zip(deltas, weights_K.tolist(), strict=True):
        delta_P.add_(delta, alpha=weight)
    return replace(
        sums,
        weight=sums.weight + float(weights_K.sum()),
        rank_weights=sums.rank_weights + rank_weights(held, weights_K, layout.rank),
        delta=delta_P,
        products=tuple(products),
    )


def matrices_at_once(group: ShapeGroup, width: int) -> int:
    """Return how many matrices of a group fit the workspace, as stacks of `width` columns or as matrices."""
    numbers = min(width * (group.out_features + group.in_features), group.out_features * group.in_features)
    return max(1, WORKSPACE // (8 * max(1, numbers)))


@dataclass(frozen=True, eq=False)
class MeanChange:
    """The mean change a', b' of the factors of some matrices of one shape, and their residual R."""

    a_LRI: torch.Tensor
    b_LOR: torch.Tensor
    residual: Product

    def per_column(self, shares_R: torch.Tensor) -> "MeanChange":
        """Return every column as the mean over the share of clients that trains it, in place of over all."""
        if float(shares_R.min()) > 1 - ROUNDING:
            return self
        shares_R = torch.where(shares_R > 0, shares_R, 1.0)  # a column nobody trains stays as it is
        return replace(self, a_LRI=self.a_LRI / shares_R[:, None], b_LOR=self.b_LOR / shares_R)


def change_of_vector(layout: AdapterLayout, delta_P: torch.Tensor, indices: tuple[int, ...]) -> MeanChange:
    """Return the named matrices of one flat change, without a residual."""
    a_LKRI, b_LOKR = stack_factors(layout, (delta_P,), indices)
    nothing = Product(b_LOKR[:, :, 0, :0], a_LKRI[:, 0, :0])  # factors of no columns: a product of zeros
    return MeanChange(a_LKRI[:, 0], b_LOKR[:, :, 0], nothing)


def change_of_sums(sums: FoldedSums, layout: AdapterLayout, place: int, part: slice) -> MeanChange:
    """Return the mean change of the matrices `part` of the shape group at `place`."""
    indices = shape_groups(layout)[place].indices[part]
    total = change_of_vector(layout, sums.delta, indices)
    change = replace(total, a_LRI=total.a_LRI / sums.weight, b_LOR=total.b_LOR / sums.weight)
    if not sums.products:
        return change.per_column(sums.rank_weights / sums.weight)
    # R = C - b' a', with C divided by the weight on the way.
    dense = torch.baddbmm(
        sums.products[place][part].cpu(), change.b_LOR, change.a_LRI, beta=1 / sums.weight, alpha=-1.0
    )
    return replace(change, residual=Product(dense))


def change_of_held(
    layout: AdapterLayout,
    held: tuple[HeldUpdate, ...],
    weights_K: torch.Tensor,
    indices: tuple[int, ...],
    *,
    with_residual: bool,
) -> MeanChange:
    """Return the mean change sum w_i (a_i, b_i) of the named matrices and R = sum w_i b_i a_i - b' a'.

    Every term of R is as small as the clients' disagreement, so clients that agree leave no rounding noise.
    """
    matrix, columns = layout.matrices[indices[0]], len(held) * layout.rank
    num_out, num_in = matrix.out_features, matrix.in_features
    is_dense = with_residual and columns * (num_out + num_in) > num_out * num_in
    device = product_device(columns if is_dense else 0)
    sum_to_one = abs(float(weights_K.sum()) - 1) < ROUNDING
    weights_K = weights_K.to(device)
    a_LKRI, b_LOKR = stack_factors(layout, [update.delta for update in held], indices, device)
    mean_LRI = (weights_K @ a_LKRI.flatten(2)).view(len(indices), *a_LKRI.shape[2:])
    mean_LOR = (b_LOKR * weights_K[:, None]).sum(dim=2)
    number = 0
    if with_residual:
        number = len(held)
        b_LOKR.sub_(mean_LOR[:, :, None]).mul_(weights_K[:, None])
        if sum_to_one:
            # The w_i (b_i - b') sum to zero, so one a_i may be taken from all: its own term is gone.
            a_LKRI.sub_(a_LKRI[:, -1:].clone())
            number -= 1
    factors = Product(b_LOKR[:, :, :number].flatten(2), a_LKRI[:, :number].flatten(1, 2))
    return MeanChange(mean_LRI.cpu(), mean_LOR.cpu(), factors.lightest().cpu())
