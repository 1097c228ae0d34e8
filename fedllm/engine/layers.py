"""Puts the adapters of a bank on a model's frozen linear layers, and takes them off again."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fedllm.engine.adapter_bank import Bank
from fedllm.engine.kernels import adapted_output
from fedllm.models.attention import ragged
from fedllm.models.base import plain_linear


class BankLinear(nn.Module):
    """y = base(x) + scale * B A x, with the factors of whichever client each token belongs to.

    Plain linear layers are computed inside the operator; a quantised one is only called.
    """

    def __init__(self, base: nn.Module, bank: Bank, index: int):
        super().__init__()
        self.base = base
        self.bank = bank
        self.group = (index,)

    @property
    def weight(self) -> Any:
        """The frozen weight. Mamba reads one, and an adapter on that layer changes nothing, as in PEFT."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The frozen bias."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapted output, [..., D_in] -> [..., D_out]."""
        flat = x.reshape(-1, x.shape[-1])
        frozen = plain_linear(self.base)
        y = adapted_output(flat, frozen, self.bank, self.group).view(*x.shape[:-1], -1)
        if frozen is None:  # quantised: only the layer itself can compute its product
            y = y + self.base(x)
        return y


@contextmanager
def attached(model: Any, bank: Bank, *, is_ragged: bool = False) -> Iterator[None]:
    """Put the adapters of `bank` on the layers its layout names, and take them off again.

    With `is_ragged` the model also attends within each sample of a flat row (`fedllm.models.attention`). The
    bank's GPU is the current one meanwhile, since Triton launches there: threads and other engines may have
    chosen another.
    """
    originals = {m.module: model.get_submodule(m.module) for m in bank.layout.matrices}
    for index, name in enumerate(originals):
        _replace(model, name, BankLinear(originals[name], bank, index))
    try:
        with (
            torch.cuda.device_of(bank.tap),  # type: ignore[no-untyped-call]
            ragged(model) if is_ragged else nullcontext(),
        ):
            yield
    finally:
        for name, module in originals.items():
            _replace(model, name, module)


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")  # a module is an attribute of the one it lies in
    setattr(model.get_submodule(parent), leaf, module)
