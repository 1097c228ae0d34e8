"""Weights of linear layers that share one input, laid end to end in memory: one product computes them all.

The layers keep their weights, as views of the rows of one tensor: nothing is held twice, and whoever looks
at a layer finds what was there before.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fedllm.models.base import PlainLinear


def lay_side_by_side(layers: Sequence[Any]) -> None:
    """Move the weights, and the biases if each has one, of nn.Linear layers of one input end to end."""
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if all(parameter is not None for parameter in parameters) and joined(parameters) is None:
            whole = torch.cat([parameter.data for parameter in parameters])
            pieces = whole.split_with_sizes([len(parameter) for parameter in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.data = piece


def joined_linear(layers: Sequence[Any]) -> PlainLinear | None:
    """Return nn.Linear layers of one input as one, or None where their weights do not lie end to end."""
    weight_OI = joined([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias_O = joined(biases) if len(biases) == len(layers) else None
    if weight_OI is None or (biases and bias_O is None):
        return None
    return PlainLinear(weight_OI, bias_O)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return contiguous tensors that lie end to end in memory as the one they are parts of, else None."""
    first, length = parts[0], 0
    for part in parts:
        is_next = part.storage_offset() == first.storage_offset() + length
        if not (is_next and part.is_contiguous() and _storage(part) == _storage(first)):
            return None
        length += part.numel()
    rows = sum(map(len, parts))
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def room_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return new tensors of these shapes; where neighbours lie end to end in memory, theirs do too."""
    rooms: list[torch.Tensor] = []
    run: list[torch.Tensor] = []
    for tensor in [*tensors, None]:
        if run and (tensor is None or joined([*run, tensor]) is None):
            whole = run[0].new_empty(sum(each.numel() for each in run))
            pieces = whole.split_with_sizes([each.numel() for each in run])
            rooms += [piece.view(each.shape) for piece, each in zip(pieces, run, strict=True)]
            run = []
        if tensor is not None:
            run.append(tensor)
    return rooms


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
