"""Groups the matrices of a layout by shape, so that one batched operation serves all of a group.

Tensor suffixes: L matrices of one shape, K vectors, P flat adapter, R rank, O output, I input feature.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ShapeGroup:
    """Matrices of one shape [out_features, in_features], by their place in the layout."""

    indices: tuple[int, ...]
    out_features: int
    in_features: int


def shape_groups(layout: AdapterLayout) -> tuple[ShapeGroup, ...]:
    """Return the groups of a layout in the order of their first matrix."""
    members: dict[tuple[int, int], list[int]] = {}  # a dict keeps the order of first appearance
    for index, matrix in enumerate(layout.matrices):
        members.setdefault((matrix.out_features, matrix.in_features), []).append(index)
    return tuple(ShapeGroup(tuple(indices), *shape) for shape, indices in members.items())


def chunks_of(group: ShapeGroup, size: int) -> Iterator[slice]:
    """Yield slices of a group's matrices, `size` at a time: all at once may not fit in memory."""
    for begin in range(0, len(group.indices), size):
        yield slice(begin, begin + size)


def stack_factors(
    layout: AdapterLayout,
    vectors: Sequence[torch.Tensor],
    indices: Sequence[int],
    device: torch.device = CPU,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A [L, K, R, I], B [L, O, K, R]) in float64 of vectors [P], for matrices of one shape.

    Flattened to [L, K R, I] and [L, O, K R] they are the vectors' factors side by side. Both are new tensors
    on `device`.
    """
    # In float64: sums of thousands of products follow, and float32 would lose digits in them.
    matrix, rank, count = layout.matrices[indices[0]], layout.rank, len(vectors)
    a_shape, b_shape = (count, rank, matrix.in_features), (matrix.out_features, count, rank)
    a_LKRI = torch.empty(len(indices), *a_shape, dtype=torch.float64, device=device)
    b_LOKR = torch.empty(len(indices), *b_shape, dtype=torch.float64, device=device)
    for place, index in enumerate(indices):
        a_spec, b_spec = layout.tensors[2 * index : 2 * index + 2]  # a layout's tensors are A, B, A, B, ...
        a_KRI = torch.stack([a_spec.view(vector) for vector in vectors])
        b_OKR = torch.stack([b_spec.view(vector) for vector in vectors], dim=1)
        a_LKRI[place], b_LOKR[place] = a_KRI.to(device), b_OKR.to(device)
    return a_LKRI, b_LOKR


def put_factors(
    layout: AdapterLayout,
    vector: torch.Tensor,
    indices: Sequence[int],
    a_LRI: torch.Tensor,
    b_LOR: torch.Tensor,
) -> None:
    """Write the factors of the named matrices into `vector` [P]."""
    for place, index in enumerate(indices):
        a_spec, b_spec = layout.tensors[2 * index : 2 * index + 2]
        a_spec.view(vector).copy_(a_LRI[place])
        b_spec.view(vector).copy_(b_LOR[place])
