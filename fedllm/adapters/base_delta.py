"""The base delta: what a federation has added to the frozen base model itself, next to the adapter it trains.

FedEx-LoRA (arXiv 2410.09432) adds each round's residual to the base, FLoRA (arXiv 2409.05976) the whole
round. Every client needs the sum of all rounds, also one that joins late. It is one factor pair per matrix,
exact to the rounding of float32. It has two written forms: named tensors for files (`to_tensors`) and one
vector with a list of ranks for messages (`to_flat`).
Tensor suffixes: O output feature, I input feature, N rank of a matrix's base delta, R rank of the adapter.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fedllm.adapters.algebra import Product, decompose, rounding_floor, squared_norm
from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.errors import LayoutError, NonFiniteError
from fedllm.finite import all_finite


@dataclass(frozen=True, eq=False)
class BaseDelta:
    """Per matrix of `layout` a pair (B [O, N], A [N, I]) in float32; the base gains layout.scale * B A.

    N differs between matrices and is 0 where nothing was added.
    """

    layout: AdapterLayout
    factors: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __post_init__(self) -> None:
        if len(self.factors) != len(self.layout.matrices):
            raise LayoutError("the base delta does not name every matrix of the layout")
        for matrix, (b_ON, a_NI) in zip(self.layout.matrices, self.factors, strict=True):
            wanted = (matrix.out_features, b_ON.shape[-1]), (b_ON.shape[-1], matrix.in_features)
            if (tuple(b_ON.shape), tuple(a_NI.shape)) != wanted:
                raise LayoutError(f"the base delta of {matrix.module} has the wrong shape")

    @property
    def size(self) -> int:
        """Number of values, all matrices together."""
        return sum(b_ON.numel() + a_NI.numel() for b_ON, a_NI in self.factors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of layout and values; "" where nothing was ever added."""
        if not self.size:
            return ""
        # Shapes count: the same values could be factors of other ranks.
        hasher = hashlib.sha256(self.layout.digest.encode())
        for pair in self.factors:
            for tensor in pair:
                hasher.update(str(tuple(tensor.shape)).encode())
                hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def checked_finite(self) -> "BaseDelta":
        """Return self.

        Raises:
            NonFiniteError: a value is NaN or infinite.
        """
        if not all_finite(*(tensor for pair in self.factors for tensor in pair)):
            raise NonFiniteError("the base delta holds NaN or infinite values")
        return self

    def plus(self, added: Mapping[int, Product]) -> "BaseDelta":
        """Return the base delta with `added[i]`, a product for one matrix, added to matrix i of the layout.

        Every sum is kept at the lowest rank that holds it; what is dropped is below the rounding of float32.
        """
        factors = list(self.factors)
        for index, product in added.items():
            factors[index] = _sum(self.factors[index], product)
        return BaseDelta(self.layout, tuple(factors))


def _sum(pair: tuple[torch.Tensor, torch.Tensor], product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    b_ON, a_NI = pair
    before = Product(b_ON.double()[None], a_NI.double()[None])
    # The SVD of the sum gives its lowest rank; sqrt(S) goes to either factor, so that neither grows large.
    u, s, v = decompose(before.plus(product).lightest())
    largest = torch.maximum(squared_norm(before), squared_norm(product)).sqrt()[:, None]
    alive = int((s > rounding_floor(largest)).sum())  # where both cancel, the rest is rounding
    root = s[0, :alive].sqrt()
    return (u[0, :, :alive] * root).float(), (root[:, None] * v[0, :alive]).float()


def no_base_delta(layout: AdapterLayout) -> BaseDelta:
    """Return the base delta of a base model that was left as it is."""
    return BaseDelta(
        layout,
        tuple((torch.zeros(m.out_features, 0), torch.zeros(0, m.in_features)) for m in layout.matrices),
    )


def to_tensors(base_delta: BaseDelta) -> dict[str, torch.Tensor]:
    """Return the factors by name, `MODULE.B` [O, N] and `MODULE.A` [N, I]; `from_tensors` is the inverse."""
    return {
        f"{matrix.module}.{letter}": factor
        for matrix, pair in zip(base_delta.layout.matrices, base_delta.factors, strict=True)
        for letter, factor in zip("BA", pair, strict=True)
    }


def from_tensors(layout: AdapterLayout, tensors: Mapping[str, torch.Tensor]) -> BaseDelta:
    """Return the base delta that `to_tensors` has written.

    Raises:
        LayoutError: a factor is missing or has the wrong shape.
    """
    names = [matrix.module for matrix in layout.matrices]
    try:
        return BaseDelta(layout, tuple((tensors[f"{name}.B"], tensors[f"{name}.A"]) for name in names))
    except KeyError as error:
        raise LayoutError(f"the base delta has no tensor {error}") from None


def to_flat(base_delta: BaseDelta) -> tuple[torch.Tensor, list[int]]:
    """Return all factors end to end, B before A, and each matrix's rank N; `from_flat` is the inverse."""
    # A message carries vectors without names; the layout and the ranks say where a factor begins.
    flat = torch.cat([factor.reshape(-1) for pair in base_delta.factors for factor in pair])
    return flat, [b_ON.shape[1] for b_ON, _ in base_delta.factors]


def flat_size(layout: AdapterLayout, ranks: Sequence[int]) -> int:
    """Return the length of the vector that `from_flat` takes with these ranks."""
    sides = (matrix.out_features + matrix.in_features for matrix in layout.matrices)
    return sum(rank * side for rank, side in zip(ranks, sides, strict=True))


def from_flat(layout: AdapterLayout, flat: torch.Tensor, ranks: Sequence[int]) -> BaseDelta:
    """Return the base delta that `to_flat` has written; `flat` has `flat_size(layout, ranks)` values."""
    pairs, begin = [], 0
    for matrix, rank in zip(layout.matrices, ranks, strict=True):
        middle = begin + matrix.out_features * rank
        end = middle + rank * matrix.in_features
        b_ON = flat[begin:middle].view(matrix.out_features, rank)
        pairs.append((b_ON, flat[middle:end].view(rank, matrix.in_features)))
        begin = end
    return BaseDelta(layout, tuple(pairs))


def adapter_with_base_delta(adapter: AdapterState, base_delta: BaseDelta) -> AdapterState:
    """Return one ordinary adapter that does what `adapter` does on a base with `base_delta` added.

    Its rank is the adapter's plus the largest of the base delta's; matrices with less are filled with zeros.
    The scale stays, so alpha grows with the rank.
    """
    layout, most = adapter.layout, max((b_ON.shape[1] for b_ON, _ in base_delta.factors), default=0)
    if most == 0:
        return adapter
    wider = replace(layout, rank=layout.rank + most, alpha=layout.scale * (layout.rank + most))
    vector = torch.zeros(wider.size)
    pairs = zip(layout.factors(adapter.vector), base_delta.factors, wider.factors(vector), strict=True)
    for (a_RI, b_OR), (b_ON, a_NI), (a, b) in pairs:
        end = layout.rank + b_ON.shape[1]  # what follows stays zero
        a[: layout.rank], b[:, : layout.rank] = a_RI, b_OR
        a[layout.rank : end], b[:, layout.rank : end] = a_NI, b_ON
    return AdapterState(wider, vector)
