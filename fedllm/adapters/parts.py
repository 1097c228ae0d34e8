"""Parts of an adapter: which factors of every matrix are trained and travel, A and B ("both"), "a" or "b".

A part is a flat vector of its tensors in the layout's order. FFA-LoRA (arXiv 2403.12313) trains B in every
round, RoLoRA (arXiv 2502.01755) the factors in turn; while the other factor is common to all clients, the
mean of the trained one is exact.
Tensor suffixes: P flat adapter, Q flat part.
"""

from collections.abc import Iterator

import torch

from fedllm.adapters.layout import AdapterLayout, TensorSpec

PARTS = ("both", "a", "b")


def returned_part(trained: str, local_b: bool) -> str:
    """Return the part of a delta that leaves a client: what was trained, but no B of the client's own."""
    return "a" if local_b else trained


def other_part(part: str) -> str:
    """Return the part of all factors that `part` leaves out; "none" is the empty part."""
    return {"both": "none", "a": "b", "b": "a"}[part]


def part_specs(layout: AdapterLayout, part: str) -> Iterator[TensorSpec]:
    """Yield the tensors of a part, in order; offsets are those in the whole vector."""
    for index, spec in enumerate(layout.tensors):
        if part in ("both", "ab"[index % 2]):  # a layout's tensors are A, B, A, B, ...
            yield spec


def part_size(layout: AdapterLayout, part: str) -> int:
    """Return the number of values of a part."""
    return sum(spec.size for spec in part_specs(layout, part))


def part_of(layout: AdapterLayout, vector_P: torch.Tensor, part: str) -> torch.Tensor:
    """Return the values [Q] of one part of a whole vector [P]; "both" is the vector itself."""
    if part == "both":
        return vector_P
    values = [spec.view(vector_P).reshape(-1) for spec in part_specs(layout, part)]
    return torch.cat(values) if values else vector_P[:0]


def whole_of(
    layout: AdapterLayout, part_Q: torch.Tensor, part: str, rest_P: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the whole vector [P] that has the values of a part; the rest is that of `rest_P`, or zero."""
    if part == "both":
        return part_Q
    whole_P = part_Q.new_zeros(layout.size) if rest_P is None else rest_P.clone()
    specs = list(part_specs(layout, part))
    for spec, values in zip(specs, torch.split(part_Q, [spec.size for spec in specs]), strict=True):
        spec.view(whole_P).copy_(values.view(spec.shape))
    return whole_P
