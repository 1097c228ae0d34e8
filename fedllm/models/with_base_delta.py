"""A base model with a base delta added for a while: W0 + scale * B A in every adapted layer, then W0 again.

The sum is always formed from the original weights and the whole base delta, and rounded once to the base's
dtype. So rounds leave no rounding behind, and who joins late has the same bits.
Tensor suffixes: O output feature, I input feature, N rank of the matrix's base delta.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedllm.adapters.base_delta import BaseDelta
from fedllm.errors import ModelError
from fedllm.models.base import BaseModel, plain_linear
from fedllm.models.side_by_side import room_like


@contextmanager
def with_base_delta(base: BaseModel, base_delta: BaseDelta) -> Iterator[None]:
    """Within the block `base` has `base_delta` added; after it the original weights are back, bit for bit.

    The originals are set aside, never changed. The sums stay with the base model for the next block with this
    base delta.

    Raises:
        ModelError: the base model is quantised, so nothing can be added to its weights.
    """
    if base_delta.size and base_delta not in base.sums:
        base.sums.clear()  # before new ones are made: a set of them is as large as the adapted layers
        base.sums[base_delta] = _sums(base, base_delta)
    weights = base.sums[base_delta] if base_delta.size else {}
    parameters = {name: base.model.get_submodule(name).weight for name in weights}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]  # a new pointer: the original tensor is not written to
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = originals[name]


def _sums(base: BaseModel, base_delta: BaseDelta) -> dict[str, torch.Tensor]:
    """Return weight plus base delta of every layer that has one, stored as the layer stores its weight."""
    factors = {
        matrix.module: factors
        for matrix, factors in zip(base_delta.layout.matrices, base_delta.factors, strict=True)
        if factors[0].numel()
    }
    layers: list[Any] = [base.model.get_submodule(name) for name in factors]
    sums = {}
    rooms = room_like([layer.weight for layer in layers])
    for (name, (b_ON, a_NI)), layer, room in zip(factors.items(), layers, rooms, strict=True):
        plain = plain_linear(layer)
        if plain is None:
            raise ModelError(
                f"{name} is quantised, so the base delta of this run cannot be added to it;"
                " set model.quantization = none, or use a read-out without a base delta"
            )
        weight_OI = plain.weight_OI
        # In bfloat16 the product itself would be rounded, and differ from device to device.
        dtype = torch.promote_types(weight_OI.dtype, torch.float32)
        b, a = b_ON.to(weight_OI.device, dtype), a_NI.to(weight_OI.device, dtype)
        sum_OI = torch.addmm(weight_OI.to(dtype), b, a, alpha=base_delta.layout.scale)
        sums[name] = room.copy_(sum_OI if weight_OI is layer.weight else sum_OI.T)
    return sums
