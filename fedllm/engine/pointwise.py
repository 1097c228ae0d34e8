"""The work between the products of a decoder layer: norms, rotation of positions, the gated activation.

Each is one step forward and one back, and between them only what the step back needs is kept. A GPU does each
in one kernel (`fedllm.engine.triton.pointwise`); `PlainPointwise` is the same in torch, for a CPU and as the
twin of those kernels. Values are rounded to the model's dtype where transformers rounds them.
Papers: RMSNorm arXiv 1910.07467, rotary positions arXiv 2104.09864, SwiGLU arXiv 2002.05202.
Tensor suffixes: T token, D feature, H query head, K key head, E feature of a head, W all heads' features of
query, key and value side by side, F feature inside the gated layer.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import silu


@dataclass(frozen=True, eq=False)
class Norm:
    """A root-mean-square norm: x / sqrt(mean(x^2) + epsilon) * weight."""

    weight_D: torch.Tensor
    epsilon: float


@dataclass(frozen=True, eq=False)
class Heads:
    """How the features W divide into heads, and the norms of each query and key head, if any."""

    num_queries: int
    num_keys: int
    dim: int
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class Angles:
    """Cosine and sine of each token's rotation, [T, E / 2]: one angle for each pair of features of a head."""

    cos: torch.Tensor
    sin: torch.Tensor


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of queries [T, H, E], keys and values [T, K, E]


class Pointwise(Protocol):
    """The steps, each with its way back; nothing of autograd."""

    def norm(self, x_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return x, normed."""

    def add_norm(
        self, x_TD: torch.Tensor, more_TD: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + more, and that normed."""

    def norm_backward(
        self, grad_TD: torch.Tensor, through_TD: torch.Tensor | None, x_TD: torch.Tensor, norm: Norm
    ) -> torch.Tensor:
        """Return the gradient of what was normed, x, from that of the result; `through` is added to it."""

    def rotate(self, all_TW: torch.Tensor, angles: Angles, heads: Heads) -> Three:
        """Return queries, keys and values; the first two normed where they have norms, then rotated."""

    def rotate_backward(
        self, grads: Three, all_TW: torch.Tensor, angles: Angles, heads: Heads
    ) -> torch.Tensor:
        """Return the gradient of all_TW, whose values are needed only where heads have norms."""

    def gate(self, both_TF: torch.Tensor) -> torch.Tensor:
        """Return silu(first half) * second half, [T, 2 F] -> [T, F]."""

    def gate_backward(self, grad_TF: torch.Tensor, both_TF: torch.Tensor) -> torch.Tensor:
        """Return the gradient of both halves, [T, 2 F]."""


@dataclass(frozen=True)
class PlainPointwise:
    """The steps in torch."""

    def norm(self, x_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `Pointwise`."""
        wide_TD = x_TD.float()
        return norm.weight_D * (wide_TD * _inverse_size(wide_TD, norm)).to(x_TD.dtype)

    def add_norm(
        self, x_TD: torch.Tensor, more_TD: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Pointwise`."""
        sum_TD = x_TD + more_TD
        return sum_TD, self.norm(sum_TD, norm)

    def norm_backward(
        self, grad_TD: torch.Tensor, through_TD: torch.Tensor | None, x_TD: torch.Tensor, norm: Norm
    ) -> torch.Tensor:
        """See `Pointwise`."""
        # y = w x s with s = mean(x^2)^(-1/2): dx = s (w g - x s^2 mean(x w g)).
        wide_TD = x_TD.float()
        inverse_T1 = _inverse_size(wide_TD, norm)
        inner_TD = (grad_TD * norm.weight_D).to(torch.float32, copy=True)
        shared_T1 = torch.linalg.vecdot(wide_TD, inner_TD)[..., None] * inverse_T1.square() / -x_TD.shape[-1]
        dx_TD = inner_TD.addcmul_(wide_TD, shared_T1).mul_(inverse_T1).to(x_TD.dtype)
        return dx_TD if through_TD is None else dx_TD.add_(through_TD)

    def rotate(self, all_TW: torch.Tensor, angles: Angles, heads: Heads) -> Three:
        """See `Pointwise`."""
        query, key, value = _split(all_TW, heads)
        if heads.query_norm is not None and heads.key_norm is not None:
            query, key = self.norm(query, heads.query_norm), self.norm(key, heads.key_norm)
        return _turned(query, angles.cos, angles.sin), _turned(key, angles.cos, angles.sin), value

    def rotate_backward(
        self, grads: Three, all_TW: torch.Tensor, angles: Angles, heads: Heads
    ) -> torch.Tensor:
        """See `Pointwise`."""
        query, key, value = grads
        query, key = (_turned(grad, angles.cos, -angles.sin) for grad in (query, key))  # the other way round
        if all_TW is not None and heads.query_norm is not None and heads.key_norm is not None:
            before = _split(all_TW, heads)
            query = self.norm_backward(query, None, before[0], heads.query_norm)
            key = self.norm_backward(key, None, before[1], heads.key_norm)
        return torch.cat([grad.flatten(1) for grad in (query, key, value)], dim=1)

    def gate(self, both_TF: torch.Tensor) -> torch.Tensor:
        """See `Pointwise`."""
        gate_TF, up_TF = both_TF.chunk(2, dim=1)
        return silu(gate_TF).mul_(up_TF)

    def gate_backward(self, grad_TF: torch.Tensor, both_TF: torch.Tensor) -> torch.Tensor:
        """See `Pointwise`."""
        gate_TF, up_TF = both_TF.chunk(2, dim=1)
        grads_TF = torch.empty_like(both_TF)
        of_gate_TF, of_up_TF = grads_TF.chunk(2, dim=1)
        torch.mul(grad_TF, silu(gate_TF), out=of_up_TF)
        torch.ops.aten.silu_backward(grad_TF * up_TF, gate_TF, grad_input=of_gate_TF)
        return grads_TF


def _inverse_size(wide: torch.Tensor, norm: Norm) -> torch.Tensor:
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.rsqrt(size.square() / wide.shape[-1] + norm.epsilon)


def _split(all_TW: torch.Tensor, heads: Heads) -> Three:
    """Return views [T, heads, E] of queries, keys and values."""
    numbers = (heads.num_queries, heads.num_keys, heads.num_keys)
    parts = all_TW.view(len(all_TW), -1, heads.dim).split_with_sizes(numbers, dim=1)
    return parts[0], parts[1], parts[2]


def _turned(heads_THE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return each pair (x, y) of features turned: (x cos - y sin, y cos + x sin). A pair lies E / 2 apart."""
    cos, sin = cos.to(heads_THE.dtype)[:, None], sin.to(heads_THE.dtype)[:, None]
    first, second = heads_THE.chunk(2, dim=-1)
    turned = torch.empty(heads_THE.shape, dtype=heads_THE.dtype, device=heads_THE.device)
    to_first, to_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    return turned


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, norm: Norm, pointwise: Pointwise) -> torch.Tensor:
        ctx.save_for_backward(x_TD)
        ctx.norm, ctx.pointwise = norm, pointwise
        return pointwise.norm(x_TD, norm)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.pointwise.norm_backward(grad_TD, None, *ctx.saved_tensors, ctx.norm), None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, more_TD: torch.Tensor, norm: Norm, pointwise: Pointwise
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sum_TD, normed_TD = pointwise.add_norm(x_TD, more_TD, norm)
        ctx.save_for_backward(sum_TD)
        ctx.norm, ctx.pointwise = norm, pointwise
        return sum_TD, normed_TD

    @staticmethod
    def backward(
        ctx: Any, through_TD: torch.Tensor, grad_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        grad_TD = ctx.pointwise.norm_backward(grad_TD, through_TD, *ctx.saved_tensors, ctx.norm)
        return grad_TD, grad_TD, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, all_TW: torch.Tensor, angles: Angles, heads: Heads, pointwise: Pointwise) -> Three:
        ctx.save_for_backward(None if heads.query_norm is None else all_TW)
        ctx.angles, ctx.heads, ctx.pointwise = angles, heads, pointwise
        return pointwise.rotate(all_TW, angles, heads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (all_TW,) = ctx.saved_tensors
        return ctx.pointwise.rotate_backward(grads, all_TW, ctx.angles, ctx.heads), None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_TF: torch.Tensor, pointwise: Pointwise) -> torch.Tensor:
        ctx.save_for_backward(both_TF)
        ctx.pointwise = pointwise
        return pointwise.gate(both_TF)

    @staticmethod
    def backward(ctx: Any, grad_TF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.pointwise.gate_backward(grad_TF, *ctx.saved_tensors), None


def normed(x_TD: torch.Tensor, norm: Norm, pointwise: Pointwise) -> torch.Tensor:
    """Return `Pointwise.norm`, with a gradient."""
    return _Norm.apply(x_TD, norm, pointwise)  # type: ignore[no-untyped-call,no-any-return]


def add_normed(
    x_TD: torch.Tensor, more_TD: torch.Tensor, norm: Norm, pointwise: Pointwise
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `Pointwise.add_norm`, with gradients."""
    return _AddNorm.apply(x_TD, more_TD, norm, pointwise)  # type: ignore[no-untyped-call,no-any-return]


def rotated(all_TW: torch.Tensor, angles: Angles, heads: Heads, pointwise: Pointwise) -> Three:
    """Return `Pointwise.rotate`, with gradients."""
    return _Rotate.apply(all_TW, angles, heads, pointwise)  # type: ignore[no-untyped-call,no-any-return]


def gated(both_TF: torch.Tensor, pointwise: Pointwise) -> torch.Tensor:
    """Return `Pointwise.gate`, with a gradient."""
    return _Gate.apply(both_TF, pointwise)  # type: ignore[no-untyped-call,no-any-return]
