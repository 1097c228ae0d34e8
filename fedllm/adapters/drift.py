"""What a federation has added to the base model itself, apart from the adapter that is being trained.

FedEx-LoRA (arXiv 2410.09432) adds each round's residual to the base, FLoRA (arXiv 2409.05976) the whole
round; every client must hold the sum of all rounds, a late joiner too. It is kept as one exact factor pair
per matrix.
Tensor suffixes: O output feature, I input feature, N rank of a matrix's drift, R rank of the adapter.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedllm.adapters.algebra import Product, decompose, rounding_floor
from fedllm.adapters.layout import AdapterLayout
from fedllm.errors import LayoutError


@dataclass(frozen=True, eq=False)
class Drift:
    """Per matrix of `layout` a pair (B [O, N], A [N, I]) in float32; the base gains layout.scale * B A.

    N differs between matrices and is 0 where nothing was added.
    """

    layout: AdapterLayout
    factors: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __post_init__(self) -> None:
        if len(self.factors) != len(self.layout.matrices):
            raise LayoutError("the base drift does not name every matrix of the layout")
        for matrix, (b_ON, a_NI) in zip(self.layout.matrices, self.factors, strict=True):
            wanted = (matrix.out_features, b_ON.shape[-1]), (b_ON.shape[-1], matrix.in_features)
            if (tuple(b_ON.shape), tuple(a_NI.shape)) != wanted:
                raise LayoutError(f"the base drift of {matrix.module} has the wrong shape")

    @property
    def size(self) -> int:
        """Number of values, all matrices together."""
        return sum(b_ON.numel() + a_NI.numel() for b_ON, a_NI in self.factors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of layout and values; "" where nothing was ever added."""
        if not self.size:
            return ""
        hasher = hashlib.sha256(self.layout.digest.encode())
        for pair in self.factors:
            for tensor in pair:
                hasher.update(str(tuple(tensor.shape)).encode())
                hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def plus(self, products: Sequence[Product]) -> "Drift":
        """Return the drift with one more product per matrix, at the lowest rank that holds the sum."""
        summed = []
        for (b_ON, a_NI), product in zip(self.factors, products, strict=True):
            u, s, v = decompose(product.plus(1.0, b_ON, a_NI))
            alive = int((s > rounding_floor(s)).sum())
            root = s[:alive].sqrt()
            summed.append(((u[:, :alive] * root).float(), (root[:, None] * v[:alive]).float()))
        return Drift(self.layout, tuple(summed))


def no_drift(layout: AdapterLayout) -> Drift:
    """Return the drift of a base model that was left as it is."""
    return Drift(
        layout,
        tuple((torch.zeros(m.out_features, 0), torch.zeros(0, m.in_features)) for m in layout.matrices),
    )
