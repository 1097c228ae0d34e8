"""Two adapters side by side in one: the columns of the first, then those of the second.

Their effects add up, s (B1 A1 + B2 A2) = s [B1 B2] [A1; A2], so that a shared and a personal adapter are one
adapter of the ranks' sum to every kernel. Both have the same scale s.
Tensor suffixes: P flat adapter.
"""

import torch

from fedllm.adapters.layout import AdapterLayout, at_rank, with_rank


def side_by_side(
    layout: AdapterLayout, first_P: torch.Tensor, second_P: torch.Tensor, second_rank: int
) -> torch.Tensor:
    """Return [first | second] as a vector of `layout` at the sum of the ranks; `layout` is the first's."""
    rank = layout.rank + second_rank
    both_P = with_rank(first_P, layout, rank).clone()
    factors = zip(
        at_rank(layout, rank).factors(both_P), at_rank(layout, second_rank).factors(second_P), strict=True
    )
    for (a, b), (second_a, second_b) in factors:
        a[layout.rank :] = second_a
        b[:, layout.rank :] = second_b
    return both_P


def second_of(layout: AdapterLayout, both_P: torch.Tensor, second_rank: int) -> torch.Tensor:
    """Return the second adapter of `side_by_side`, a vector of `layout` at its rank."""
    wide = at_rank(layout, layout.rank + second_rank)
    parts = []
    for a, b in wide.factors(both_P):
        parts += [a[layout.rank :].reshape(-1), b[:, layout.rank :].reshape(-1)]
    return torch.cat(parts)


def second_mask(layout: AdapterLayout, second_rank: int) -> torch.Tensor:
    """Return which values of `side_by_side` are the second adapter's, as booleans."""
    size = at_rank(layout, second_rank).size
    shared = torch.zeros(layout.size, dtype=torch.bool)
    return side_by_side(layout, shared, torch.ones(size, dtype=torch.bool), second_rank)
