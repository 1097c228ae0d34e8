"""LoRA layers whose factors are views of one flat vector.

Writing an adapter into the model is one copy, reading it is none, and clipping or stepping it is one kernel
over [P], whatever the number of layers. The frozen layer underneath may be quantised: it is only called.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from fedllm.adapters.layout import AdapterLayout


class LoraLinear(nn.Module):
    """y = base(x) + scale * (x A^T) B^T with A [R, D_in] and B [D_out, R] (arXiv 2106.09685)."""

    def __init__(self, base: nn.Module, a_RD: torch.Tensor, b_DR: torch.Tensor, scale: float):
        super().__init__()
        self.base = base
        self.a_RD = a_RD  # plain tensors, not parameters: they live in the flat vector
        self.b_DR = b_DR
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapted output, [..., D_in] -> [..., D_out], in the base layer's dtype."""
        y = self.base(x)
        low_rank = linear(linear(x.to(self.a_RD.dtype), self.a_RD), self.b_DR)
        return y + (self.scale * low_rank).to(y.dtype)  # type: ignore[no-any-return]


class FlatAdapter:
    """One adapter attached to a resident model: `vector` [P] and its gradient `grad` [P]."""

    def __init__(self, layout: AdapterLayout, device: torch.device, dtype: torch.dtype):
        self.layout = layout
        self.vector = torch.zeros(layout.size, device=device, dtype=dtype)
        self.grad = torch.zeros_like(self.vector)
        self.factors = layout.factors(self.vector)
        # Leaves that share the flat storage: autograd accumulates straight into the flat gradient.
        for pair, gradients in zip(self.factors, layout.factors(self.grad), strict=True):
            for tensor, gradient in zip(pair, gradients, strict=True):
                tensor.requires_grad_()
                tensor.grad = gradient

    @torch.no_grad()
    def write(self, vector: torch.Tensor) -> None:
        """Overwrite the adapter with `vector` [P] and forget its gradient."""
        self.vector.copy_(vector)
        self.grad.zero_()


@contextmanager
def attached(model: Any, adapter: FlatAdapter) -> Iterator[None]:
    """Put `adapter` on the layers its layout names, and take it off again."""
    originals = {m.module: model.get_submodule(m.module) for m in adapter.layout.matrices}
    for matrix, (a_RD, b_DR) in zip(adapter.layout.matrices, adapter.factors, strict=True):
        wrapped = LoraLinear(originals[matrix.module], a_RD, b_DR, adapter.layout.scale)
        _replace(model, matrix.module, wrapped)
    try:
        yield
    finally:
        for name, module in originals.items():
            _replace(model, name, module)


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
