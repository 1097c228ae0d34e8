"""What a recorded pass computes with: a pass and its criterion, in memory that the next pass refills."""

from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from fedllm.engine.head import Criterion, CrossEntropy
from fedllm.engine.pass_inputs import PassArrays, PassInputs, place


@dataclass(frozen=True, eq=False)
class RecordedInputs:
    """A pass that is padded, on a device, and what the loss of its learnt tokens is."""

    inputs: PassInputs
    criterion: Criterion

    def refill(self, arrays: PassArrays, criterion: Criterion | None) -> None:
        """Put another pass of the same sizes, and a criterion of the same kind, into the same memory."""
        self.inputs.buffer.write(arrays.named())
        if criterion is not None:
            held = _tensors(self.criterion)
            for name, values_N in _tensors(criterion).items():
                held[name][: len(values_N)].copy_(values_N)  # what follows is of weight zero


def recorded_inputs(arrays: PassArrays, criterion: Criterion | None, device: torch.device) -> RecordedInputs:
    """Return a padded pass on a device; its criterion is cross-entropy with the next token if there is none.

    A criterion for fewer tokens than the padded pass has is zero for the others.
    """
    inputs = place(arrays, device)
    if criterion is None:
        return RecordedInputs(inputs, CrossEntropy(inputs.flat.targets_N))
    number = len(inputs.weights_N)
    longer = {}
    for name, values_N in _tensors(criterion).items():
        longer[name] = values_N.new_zeros(number, *values_N.shape[1:])
        longer[name][: len(values_N)] = values_N
    changed: Any = criterion
    return RecordedInputs(inputs, replace(changed, **longer))


def can_be_refilled(criterion: Criterion | None) -> bool:
    """Return whether all that a criterion knows of its tokens are fields with a value for each."""
    return criterion is None or is_dataclass(criterion)


def kind_of(criterion: Criterion | None) -> Hashable:
    """Return what two criteria must share for the tensors of one to take the place of the other's."""
    if criterion is None:
        return None
    tensors = {name: (held.dtype, held.shape[1:]) for name, held in _tensors(criterion).items()}
    values = tuple((name, tensors.get(name, value)) for name, value in vars(criterion).items())
    return type(criterion), values


def _tensors(criterion: Any) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(criterion, field.name) for field in fields(criterion)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
