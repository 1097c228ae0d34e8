"""The matrices of a layout grouped by shape, so that one batched operation serves all of a group.

Tensor suffixes: L matrices of one shape, K vectors, P flat adapter, R rank, O output, I input feature.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout


@dataclass(frozen=True)
class ShapeGroup:
    """Matrices of one shape [out_features, in_features], by their place in the layout."""

    indices: tuple[int, ...]
    out_features: int
    in_features: int


def shape_groups(layout: AdapterLayout) -> tuple[ShapeGroup, ...]:
    """Return the groups of a layout in the order of their first matrix."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(layout.matrices):
        members.setdefault((matrix.out_features, matrix.in_features), []).append(index)
    return tuple(ShapeGroup(tuple(indices), *shape) for shape, indices in members.items())


def parts_of(group: ShapeGroup, size: int) -> Iterator[slice]:
    """Yield slices of a group's matrices, `size` at a time."""
    for begin in range(0, len(group.indices), size):
        yield slice(begin, begin + size)


def stack_factors(
    layout: AdapterLayout, vectors: Sequence[torch.Tensor], indices: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A [L, K, R, I], B [L, K, O, R]) in float64 of vectors [P], for matrices of one shape."""
    stacks = []
    for letter in (0, 1):
        specs = [layout.tensors[2 * index + letter] for index in indices]
        flat = torch.stack(
            [vector[spec.offset : spec.offset + spec.size] for spec in specs for vector in vectors]
        )
        stacks.append(flat.double().view(len(specs), len(vectors), *specs[0].shape))
    return stacks[0], stacks[1]


def put_factors(
    layout: AdapterLayout,
    vector: torch.Tensor,
    indices: Sequence[int],
    a_LRI: torch.Tensor,
    b_LOR: torch.Tensor,
) -> None:
    """Write the factors of the named matrices into `vector` [P]."""
    for place, index in enumerate(indices):
        for letter, factor in ((0, a_LRI), (1, b_LOR)):
            spec = layout.tensors[2 * index + letter]
            vector[spec.offset : spec.offset + spec.size] = factor[place].reshape(-1)
