"""Two adapters side by side in one: the ranks of the first, then those of the second.

Their effects add up, s (B1 A1 + B2 A2) = s [B1 B2] [A1; A2]. So to every kernel a shared and a personal
adapter are one adapter with the sum of their ranks. Both have the same scale s.
Tensor suffixes: P flat adapter.
"""

import torch

from fedllm.adapters.layout import AdapterLayout, at_rank, with_rank


def side_by_side(
    layout: AdapterLayout, first_P: torch.Tensor, second_P: torch.Tensor, second_rank: int
) -> torch.Tensor:
    """Return [first | second] as a vector of `layout` at the sum of the ranks; `layout` is the first's."""
    wide, second = at_rank(layout, layout.rank + second_rank), at_rank(layout, second_rank)
    both_P = with_rank(first_P, layout, wide.rank).clone()  # `with_rank` may return the vector itself
    for (a, b), (second_a, second_b) in zip(wide.factors(both_P), second.factors(second_P), strict=True):
        a[layout.rank :], b[:, layout.rank :] = second_a, second_b
    return both_P


def take_second(layout: AdapterLayout, both_P: torch.Tensor, second_rank: int) -> torch.Tensor:
    """Return the second adapter of `side_by_side`, a vector of `layout` at its rank."""
    wide = at_rank(layout, layout.rank + second_rank)
    return layout.flatten([(a[layout.rank :], b[:, layout.rank :]) for a, b in wide.factors(both_P)])


def mask_of_second(layout: AdapterLayout, second_rank: int) -> torch.Tensor:
    """Return which values of `side_by_side` are the second adapter's, as booleans."""
    size = at_rank(layout, second_rank).size
    first = torch.zeros(layout.size, dtype=torch.bool)
    return side_by_side(layout, first, torch.ones(size, dtype=torch.bool), second_rank)
