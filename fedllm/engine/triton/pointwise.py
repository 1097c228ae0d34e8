"""`fedllm.engine.pointwise` with one Triton kernel a step and way back; the twin is `PlainPointwise` there.

A program handles one token: its norm over D features, the rotation of all its heads. Sums are in float32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes every annotation of a kernel for its own.

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fedllm.engine.pointwise import Angles, Heads, Norm, Three

_GATE_BLOCK = 1024  # features of the gated layer that a program handles


@triton.jit
def _norm_kernel(x, more, weight, total, normed, D, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    value = tl.load(x + token * D + d, mask=mask, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(more + token * D + d, mask=mask, other=0.0)).to(value.dtype)
        tl.store(total + token * D + d, value, mask=mask)
    wide = value.to(tl.float32)
    unit = (wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + epsilon))).to(value.dtype).to(tl.float32)
    scaled = unit * tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + token * D + d, scaled.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_kernel(
    grad, through, x, weight, out, D, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    wide = tl.load(x + token * D + d, mask=mask, other=0.0).to(tl.float32)
    inner = tl.load(grad + token * D + d, mask=mask, other=0.0).to(tl.float32)
    inner *= tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + epsilon)
    unit = wide * inverse
    result = inverse * (inner - unit * (tl.sum(unit * inner, 0) / D))
    if ADD:
        result += tl.load(through + token * D + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * D + d, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _head_weights(query_weight, key_weight, feature, is_query, is_key, mask):
    """Return the weights of every head's norm, [heads, features]."""
    of_query = tl.load(query_weight + feature, mask=mask, other=0.0).to(tl.float32)[None, :]
    of_key = tl.load(key_weight + feature, mask=mask, other=0.0).to(tl.float32)[None, :]
    return tl.where(is_query, of_query, tl.where(is_key, of_key, 1.0))


@triton.jit
def _rotate_kernel(
    x, query, key, value, cos, sin, query_weight, key_weight, H, K, query_epsilon, key_epsilon,
    HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    e = tl.arange(0, BLOCK_E)
    DIM: tl.constexpr = 2 * HALF
    inside = (e < HALF)[None, :]
    is_query, is_key = head < H, (head >= H) & (head < H + K)
    is_value = (head >= H + K) & (head < H + 2 * K)
    at = x + (token * (H + 2 * K) + head) * DIM + e[None, :]
    mask = (head < H + 2 * K) & inside
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        size = tl.sum(first * first + second * second, 1)[:, None] / DIM
        inverse = 1.0 / tl.sqrt(size + tl.where(is_query, query_epsilon, key_epsilon))
        inverse = tl.where(is_value, 1.0, inverse)
        first *= inverse * _head_weights(query_weight, key_weight, e, is_query, is_key, e < HALF)
        second *= inverse * _head_weights(query_weight, key_weight, e + HALF, is_query, is_key, e < HALF)
    c = tl.where(is_value, 1.0, tl.load(cos + token * HALF + e, mask=e < HALF, other=1.0)[None, :])
    s = tl.where(is_value, 0.0, tl.load(sin + token * HALF + e, mask=e < HALF, other=0.0)[None, :])
    to_first = (first * c - second * s).to(x.dtype.element_ty)
    to_second = (second * c + first * s).to(x.dtype.element_ty)
    to_query = query + (token * H + head) * DIM + e[None, :]
    to_key = key + (token * K + head - H) * DIM + e[None, :]
    to_value = value + (token * K + head - H - K) * DIM + e[None, :]
    tl.store(to_query, to_first, mask=is_query & inside)
    tl.store(to_query + HALF, to_second, mask=is_query & inside)
    tl.store(to_key, to_first, mask=is_key & inside)
    tl.store(to_key + HALF, to_second, mask=is_key & inside)
    tl.store(to_value, to_first, mask=is_value & inside)
    tl.store(to_value + HALF, to_second, mask=is_value & inside)


@triton.jit
def _rotate_backward_kernel(
    query, key, value, x, out, cos, sin, query_weight, key_weight, H, K, query_epsilon, key_epsilon,
    HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    e = tl.arange(0, BLOCK_E)
    DIM: tl.constexpr = 2 * HALF
    inside = (e < HALF)[None, :]
    is_query, is_key = (head < H) & inside, (head >= H) & (head < H + K) & inside
    is_value = (head >= H + K) & (head < H + 2 * K) & inside
    of_query = query + (token * H + head) * DIM + e[None, :]
    of_key = key + (token * K + head - H) * DIM + e[None, :]
    of_value = value + (token * K + head - H - K) * DIM + e[None, :]
    # A head has one of the three, and what is masked is 0: their sum is that one.
    first = tl.load(of_query, mask=is_query, other=0.0) + tl.load(of_key, mask=is_key, other=0.0)
    first = (first + tl.load(of_value, mask=is_value, other=0.0)).to(tl.float32)
    second = tl.load(of_query + HALF, mask=is_query, other=0.0) + tl.load(
        of_key + HALF, mask=is_key, other=0.0
    )
    second = (second + tl.load(of_value + HALF, mask=is_value, other=0.0)).to(tl.float32)
    c = tl.where(is_value, 1.0, tl.load(cos + token * HALF + e, mask=e < HALF, other=1.0)[None, :])
    s = tl.where(is_value, 0.0, tl.load(sin + token * HALF + e, mask=e < HALF, other=0.0)[None, :])
    to_first = first * c + second * s
    to_second = second * c - first * s
    place = (token * (H + 2 * K) + head) * DIM + e[None, :]
    mask = (head < H + 2 * K) & inside
    if NORM:
        first = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + place + HALF, mask=mask, other=0.0).to(tl.float32)
        size = tl.sum(first * first + second * second, 1)[:, None] / DIM
        inverse = 1.0 / tl.sqrt(size + tl.where(head < H, query_epsilon, key_epsilon))
        first *= inverse
        second *= inverse
        inner_first = to_first * _head_weights(query_weight, key_weight, e, is_query, is_key, e < HALF)
        inner_second = to_second * _head_weights(
            query_weight, key_weight, e + HALF, is_query, is_key, e < HALF
        )
        shared = tl.sum(first * inner_first + second * inner_second, 1)[:, None] / DIM
        to_first = tl.where(is_value, to_first, inverse * (inner_first - first * shared))
        to_second = tl.where(is_value, to_second, inverse * (inner_second - second * shared))
    tl.store(out + place, to_first.to(out.dtype.element_ty), mask=mask)
    tl.store(out + place + HALF, to_second.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_kernel(both, out, F, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    gate = tl.load(both + token * 2 * F + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + token * 2 * F + F + f, mask=mask, other=0.0).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * F + f, (active * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward_kernel(grad, both, out, F, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    gate = tl.load(both + token * 2 * F + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + token * 2 * F + F + f, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + token * F + f, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    to_gate = g * up * s * (1 + gate * (1 - s))
    tl.store(out + token * 2 * F + f, to_gate.to(out.dtype.element_ty), mask=mask)
    tl.store(out + token * 2 * F + F + f, (g * gate * s).to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class TritonPointwise:
    """The steps, each in one kernel; see `fedllm.engine.pointwise.Pointwise`."""

    def norm(self, x_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `Pointwise`."""
        return _normed(x_TD, None, norm)[1]

    def add_norm(
        self, x_TD: torch.Tensor, more_TD: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Pointwise`."""
        return _normed(x_TD, more_TD.contiguous(), norm)

    def norm_backward(
        self, grad_TD: torch.Tensor, through_TD: torch.Tensor | None, x_TD: torch.Tensor, norm: Norm
    ) -> torch.Tensor:
        """See `Pointwise`."""
        num_tokens, width = x_TD.shape
        grad_TD, out_TD = grad_TD.contiguous(), torch.empty_like(x_TD)
        through = grad_TD if through_TD is None else through_TD.contiguous()
        settings = {"ADD": through_TD is not None, "BLOCK": triton.next_power_of_2(width)}
        arguments = (grad_TD, through, x_TD, norm.weight_D, out_TD, width, norm.epsilon)
        _norm_backward_kernel[(num_tokens,)](*arguments, **settings)
        return out_TD

    def rotate(self, all_TW: torch.Tensor, angles: Angles, heads: Heads) -> Three:
        """See `Pointwise`."""
        numbers = (heads.num_queries, heads.num_keys, heads.num_keys)
        query, key, value = (all_TW.new_empty(len(all_TW), number, heads.dim) for number in numbers)
        _rotate(_rotate_kernel, len(all_TW), (all_TW.contiguous(), query, key, value), angles, heads)
        return query, key, value

    def rotate_backward(
        self, grads: Three, all_TW: torch.Tensor | None, angles: Angles, heads: Heads
    ) -> torch.Tensor:
        """See `Pointwise`."""
        grads = (grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous())
        out_TW = grads[0].new_empty(len(grads[0]), (heads.num_queries + 2 * heads.num_keys) * heads.dim)
        before = out_TW if all_TW is None else all_TW.contiguous()
        _rotate(_rotate_backward_kernel, len(out_TW), (*grads, before, out_TW), angles, heads)
        return out_TW

    def gate(self, both_TF: torch.Tensor) -> torch.Tensor:
        """See `Pointwise`."""
        num_tokens, width = len(both_TF), both_TF.shape[1] // 2
        out_TF = both_TF.new_empty(num_tokens, width)
        grid = (num_tokens, triton.cdiv(width, _GATE_BLOCK))
        _gate_kernel[grid](both_TF.contiguous(), out_TF, width, BLOCK=_GATE_BLOCK)
        return out_TF

    def gate_backward(self, grad_TF: torch.Tensor, both_TF: torch.Tensor) -> torch.Tensor:
        """See `Pointwise`."""
        num_tokens, width = grad_TF.shape
        both_TF = both_TF.contiguous()
        out_TF = torch.empty_like(both_TF)
        grid = (num_tokens, triton.cdiv(width, _GATE_BLOCK))
        _gate_backward_kernel[grid](grad_TF.contiguous(), both_TF, out_TF, width, BLOCK=_GATE_BLOCK)
        return out_TF


def _normed(
    x_TD: torch.Tensor, more_TD: torch.Tensor | None, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x plus `more`, if any, and that normed."""
    num_tokens, width = x_TD.shape
    x_TD = x_TD.contiguous()
    total_TD = x_TD if more_TD is None else torch.empty_like(x_TD)
    normed_TD = torch.empty_like(x_TD)
    settings = {"ADD": more_TD is not None, "BLOCK": triton.next_power_of_2(width)}
    more = x_TD if more_TD is None else more_TD
    arguments = (x_TD, more, norm.weight_D, total_TD, normed_TD, width, norm.epsilon)
    _norm_kernel[(num_tokens,)](*arguments, **settings)
    return total_TD, normed_TD


def _rotate(
    kernel: Any, num_tokens: int, tensors: tuple[torch.Tensor, ...], angles: Angles, heads: Heads
) -> None:
    """Run a kernel of the rotation; without norms of heads it gets weights that it does not read."""
    norms = (heads.query_norm, heads.key_norm)
    weights = [angles.cos if norm is None else norm.weight_D for norm in norms]
    epsilons = [0.0 if norm is None else norm.epsilon for norm in norms]
    numbers = (heads.num_queries, heads.num_keys)
    half = heads.dim // 2
    settings = {
        "HALF": half,
        "NORM": heads.query_norm is not None,
        "BLOCK_H": triton.next_power_of_2(heads.num_queries + 2 * heads.num_keys),
        "BLOCK_E": triton.next_power_of_2(half),
    }
    kernel[(num_tokens,)](*tensors, angles.cos, angles.sin, *weights, *numbers, *epsilons, **settings)
