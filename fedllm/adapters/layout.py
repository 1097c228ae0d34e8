"""What an adapter is: a layout that names every tensor, and one flat vector.

The layout is the contract of a run. Two machines that hold the same digest agree on every name, shape and
offset and on the frozen base model, so a vector that travels needs no names of its own.
Tensor suffixes: R rank, D feature.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fedllm.errors import LayoutError, NonFiniteError
from fedllm.finite import all_finite
from fedllm.seeds import derive_seed

PEFT_PREFIX = "base_model.model."  # how PEFT names the wrapped model inside an adapter file
_LARGEST_SIZE = 2**24  # of a matrix's side: a layout from outside must not claim more memory than there is
KAIMING_ROW_NORM = 3**-0.5  # root of the mean squared norm of a row of D values uniform in ±1/sqrt(D)


@dataclass(frozen=True)
class LoraMatrix:
    """One adapted linear layer: `module` computes y = W x + scale * B A x with A [R, D_in], B [D_out, R]."""

    module: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class TensorSpec:
    """Where one PEFT tensor lies in the flat vector."""

    name: str
    shape: tuple[int, int]
    offset: int

    @cached_property  # asked for by every pass and every round, for every matrix
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def view(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a view of a flat vector [P], or of many at once: [..., P] -> [..., *shape]."""
        part = vector.narrow(-1, self.offset, self.size)
        return part.view(*vector.shape[:-1], *self.shape)


@dataclass(frozen=True)
class AdapterLayout:
    """Ordered LoRA matrices of one base model, all of one rank and alpha.

    `fingerprint` identifies the base model (`fedllm.models.files.fingerprint`).
    """

    matrices: tuple[LoraMatrix, ...]
    rank: int
    alpha: float
    fingerprint: str

    def __post_init__(self) -> None:
        if not self.matrices:
            raise LayoutError("no linear layer is adapted; check lora.target-modules")
        if len({matrix.module for matrix in self.matrices}) != len(self.matrices):
            raise LayoutError("a layer is adapted twice")

    @property
    def scale(self) -> float:
        """The factor alpha / rank in front of B A."""
        return self.alpha / self.rank

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """PEFT tensors in order: A then B of every matrix."""
        specs, offset = [], 0
        for matrix in self.matrices:
            for letter, shape in (
                ("A", (self.rank, matrix.in_features)),
                ("B", (matrix.out_features, self.rank)),
            ):
                spec = TensorSpec(f"{PEFT_PREFIX}{matrix.module}.lora_{letter}.weight", shape, offset)
                specs.append(spec)
                offset += spec.size
        return tuple(specs)

    @cached_property
    def size(self) -> int:
        """Number of values of the flat vector."""
        return self.tensors[-1].offset + self.tensors[-1].size

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything above."""
        # One spelling for all machines and versions: digests of two of them are compared.
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-ready form; `layout_from_dict` is its inverse."""
        matrices = tuple(dict(vars(matrix)) for matrix in self.matrices)  # `asdict` takes 20 ms for hundreds
        return {"matrices": matrices, "rank": self.rank, "alpha": self.alpha, "fingerprint": self.fingerprint}

    def views(self, vector: torch.Tensor) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """Yield every tensor of `vector` [..., P] as a view of its storage, in order."""
        for spec in self.tensors:
            yield spec, spec.view(vector)

    def factors(self, vector: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (A [..., R, D_in], B [..., D_out, R]) of every matrix as views of `vector` [..., P]."""
        tensors = [view for _, view in self.views(vector)]
        return list(zip(tensors[0::2], tensors[1::2], strict=True))

    def flatten(self, factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Return the flat vector [P] of (A, B) pairs; the inverse of `factors`."""
        return torch.cat([tensor.reshape(-1) for pair in factors for tensor in pair])


def at_rank(layout: AdapterLayout, rank: int) -> AdapterLayout:
    """Return `layout` at another rank and the same scale, so that cutting ranks keeps products comparable."""
    return layout if rank == layout.rank else replace(layout, rank=rank, alpha=layout.scale * rank)


def with_rank(vector: torch.Tensor, layout: AdapterLayout, rank: int) -> torch.Tensor:
    """Return `vector` [P] of `layout` as the vector of the same layout at another rank.

    Growing adds zero rows to A and zero columns to B, which change nothing and get no gradient; shrinking
    takes away the last ones, so it undoes growing.
    """
    if rank == layout.rank:
        return vector
    common = min(rank, layout.rank)
    resized = at_rank(layout, rank)
    result = vector.new_zeros(resized.size)
    for (a_RD, b_DR), (a, b) in zip(layout.factors(vector), resized.factors(result), strict=True):
        a[:common], b[:, :common] = a_RD[:common], b_DR[:, :common]
    return result


def layout_from_dict(values: dict[str, object]) -> AdapterLayout:
    """Rebuild a layout from `AdapterLayout.to_dict`.

    Raises:
        LayoutError: an entry is missing or of the wrong kind.
    """
    try:
        matrices = tuple(
            LoraMatrix(str(item["module"]), int(item["in_features"]), int(item["out_features"]))
            for item in values["matrices"]  # type: ignore[attr-defined]
        )
        rank, alpha = int(values["rank"]), float(values["alpha"])  # type: ignore[call-overload, arg-type]
        layout = AdapterLayout(matrices, rank, alpha, str(values["fingerprint"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise LayoutError(f"not an adapter layout ({type(error).__name__})") from None
    sizes = [rank, *(size for one in matrices for size in (one.in_features, one.out_features))]
    if not (min(sizes) >= 1 and max(sizes) <= _LARGEST_SIZE and math.isfinite(alpha)):
        raise LayoutError(f"not an adapter layout: its rank and sizes are not from 1 to {_LARGEST_SIZE:,}")
    return layout


@dataclass(frozen=True, eq=False)
class AdapterState:
    """An adapter: its layout and one flat vector [P] of float32 on the CPU."""

    layout: AdapterLayout
    vector: torch.Tensor

    def __post_init__(self) -> None:
        if self.vector.shape != (self.layout.size,):
            got = "x".join(map(str, self.vector.shape))
            raise LayoutError(f"adapter vector has shape {got}, the layout needs {self.layout.size}")
        if self.vector.dtype != torch.float32 or self.vector.device.type != "cpu":
            raise LayoutError(
                f"adapter vector is {self.vector.dtype} on {self.vector.device}, expected float32 on the CPU"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of layout and values: equal digests mean equal adapters, bit for bit."""
        hasher = hashlib.sha256(self.layout.digest.encode())
        hasher.update(self.vector.numpy().tobytes())
        return hasher.hexdigest()

    def checked_finite(self) -> "AdapterState":
        """Return self.

        Raises:
            NonFiniteError: a value is NaN or infinite.
        """
        if not all_finite(self.vector):
            raise NonFiniteError("the adapter holds NaN or infinite values")
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return named PEFT tensors that share this state's storage."""
        return {spec.name: view for spec, view in self.layout.views(self.vector)}


def initial_adapter(layout: AdapterLayout, seed: int, init_a: str = "kaiming") -> AdapterState:
    """Return the adapter every client starts from: B zero, A drawn from the seed.

    `init_a` is "kaiming" (uniform in ±1/sqrt(D_in), PEFT's default) or "orthonormal": rows at right angles,
    each as long as a kaiming row is on average. With A so drawn and frozen, training B by plain gradient
    steps is FedSVD (arXiv 2505.12805): an SVD of B A never leaves the row space of A.

    Raises:
        LayoutError: orthonormal rows are asked for and a matrix has fewer inputs than the rank.
    """
    # On the CPU, so that every machine draws the same bits.
    generator = torch.Generator().manual_seed(derive_seed(seed, "initial-adapter"))
    vector = torch.zeros(layout.size)
    for matrix, (a_RD, _) in zip(layout.matrices, layout.factors(vector), strict=True):
        if init_a == "kaiming":
            a_RD.uniform_(-1.0, 1.0, generator=generator).mul_(matrix.in_features**-0.5)
            continue
        if layout.rank > matrix.in_features:
            raise LayoutError(
                f"lora.init-a = orthonormal: {matrix.module} has {matrix.in_features} inputs, which cannot"
                f" hold {layout.rank} rows at right angles; lower lora.rank or use kaiming"
            )
        gaussian_DR = torch.randn(matrix.in_features, layout.rank, generator=generator, dtype=torch.float64)
        q_DR, r_RR = torch.linalg.qr(gaussian_DR)
        q_DR *= r_RR.diagonal().sign()  # QR leaves the signs open; this makes the draw uniform (Haar)
        a_RD.copy_(q_DR.T * KAIMING_ROW_NORM)
    return AdapterState(layout, vector)
