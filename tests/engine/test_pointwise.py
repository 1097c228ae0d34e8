"""Norm, rotation and gate: torch's against transformers' formulas, and so are those of Triton's kernels."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from fedllm.engine.pointwise import (
    Angles,
    Heads,
    Norm,
    PlainPointwise,
    Pointwise,
    add_normed,
    gated,
    normed,
    rotated,
)
from tests.builders import compile_kernels

TOKENS, WIDTH = 5, 24
HEADS = [Heads(3, 2, 8), Heads(4, 1, 12, Norm(torch.rand(12) + 0.5, 1e-5), Norm(torch.rand(12) + 0.5, 1e-3))]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=["plain", "triton"])
def pointwise(request: pytest.FixtureRequest) -> Iterator[Pointwise]:
    """Return the steps in torch, and in Triton's interpreter on the CPU."""
    if request.param == "plain":
        yield PlainPointwise()
        return
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton is compiled for the GPU in this process")
    torch.use_deterministic_algorithms(True)  # new memory then holds NaN: what a kernel leaves out is seen
    yield importlib.import_module("fedllm.engine.triton.pointwise").TritonPointwise()
    torch.use_deterministic_algorithms(False)


def given(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def angles(dim: int) -> tuple[Angles, torch.Tensor, torch.Tensor]:
    """Return angles of TOKENS tokens, and transformers' form of them."""
    turns = 6 * torch.rand(TOKENS, dim // 2, generator=torch.Generator().manual_seed(3))
    cos, sin = turns.cos(), turns.sin()
    return Angles(cos, sin), torch.cat([cos, cos], 1)[None], torch.cat([sin, sin], 1)[None]


def check_same(found: Any, expected: Any, *inputs: torch.Tensor) -> None:
    """Compare outputs, and the gradients that outputs of one kind give the inputs."""
    grads = [torch.randn(each.shape, generator=torch.Generator().manual_seed(7)) for each in expected]
    torch.testing.assert_close(tuple(found), tuple(expected), **CLOSE)
    of_found = torch.autograd.grad(tuple(found), inputs, grads)
    of_expected = torch.autograd.grad(tuple(expected), inputs, grads)
    torch.testing.assert_close(of_found, of_expected, **CLOSE)


def their_norm(norm: Norm) -> Qwen3RMSNorm:
    module = Qwen3RMSNorm(len(norm.weight_D), norm.epsilon)
    module.weight.data = norm.weight_D
    return module


def test_norm_is_that_of_transformers(pointwise: Pointwise) -> None:
    x, norm = given(TOKENS, WIDTH), Norm(given(WIDTH, seed=1).detach(), 1e-2)
    check_same([normed(x, norm, pointwise)], [their_norm(norm)(x)], x)


def test_sum_and_its_norm_are_those_of_transformers(pointwise: Pointwise) -> None:
    x, more, norm = given(TOKENS, WIDTH), given(TOKENS, WIDTH, seed=2), Norm(torch.ones(WIDTH), 1e-5)
    check_same(add_normed(x, more, norm, pointwise), [x + more, their_norm(norm)(x + more)], x, more)


@pytest.mark.parametrize("heads", HEADS, ids=["plain heads", "normed heads"])
def test_rotation_is_that_of_transformers(heads: Heads, pointwise: Pointwise) -> None:
    numbers = (heads.num_queries, heads.num_keys, heads.num_keys)
    all_TW = given(TOKENS, sum(numbers) * heads.dim)
    turns, cos, sin = angles(heads.dim)
    query, key, value = all_TW.view(TOKENS, -1, heads.dim).split(numbers, dim=1)
    if heads.query_norm is not None and heads.key_norm is not None:
        query, key = their_norm(heads.query_norm)(query), their_norm(heads.key_norm)(key)
    query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin, unsqueeze_dim=2)
    check_same(rotated(all_TW, turns, heads, pointwise), [query[0], key[0], value], all_TW)


def test_gate_is_silu_times_up(pointwise: Pointwise) -> None:
    both = given(TOKENS, 2 * 1031)  # more features than one program of a kernel takes, and no round number
    gate, up = both.chunk(2, dim=1)
    check_same([gated(both, pointwise)], [torch.nn.functional.silu(gate) * up], both)


def test_kernels_compile_for_a_gpu() -> None:
    pytest.importorskip("triton")
    size = {"D": "i32", "epsilon": "fp32", "ADD": True, "BLOCK": 1024}
    heads = {"cos": "*fp32", "sin": "*fp32", "query_weight": "*bf16", "key_weight": "*bf16"}
    heads |= {"H": "i32", "K": "i32", "query_epsilon": "fp32", "key_epsilon": "fp32"}
    blocks = {"HALF": 48, "NORM": True, "BLOCK_H": 16, "BLOCK_E": 64}

    def tensors(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "*bf16")

    kernels = {
        "_norm_kernel": tensors("x", "more", "weight", "total", "normed") | size,
        "_norm_backward_kernel": tensors("grad", "through", "x", "weight", "out") | size,
        "_rotate_kernel": tensors("x", "query", "key", "value") | heads | blocks,
        "_rotate_backward_kernel": tensors("query", "key", "value", "x", "out") | heads | blocks,
        "_gate_kernel": tensors("both", "out") | {"F": "i32", "BLOCK": 1024},
        "_gate_backward_kernel": tensors("grad", "both", "out") | {"F": "i32", "BLOCK": 1024},
    }
    compile_kernels("fedllm.engine.triton.pointwise", kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [Heads(9, 3, 64), Heads(12, 2, 128)], ids=["135m", "1.5b"])
def test_triton_steps_agree_with_plain_ones_on_a_gpu(dtype: torch.dtype, heads: Heads) -> None:
    """Up to one rounding of each value: 2^-8 in bfloat16."""
    kernels = importlib.import_module("fedllm.engine.triton.pointwise").TritonPointwise()
    plain, tokens, bound = PlainPointwise(), 333, 1e-5 if dtype == torch.float32 else 8e-3
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    def check(found: Any, expected: Any) -> None:
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for one, other in pairs:
            assert float((one.float() - other.float()).norm()) <= bound * float(other.float().norm())

    norm, x, more, grad = Norm(draw(1536), 1e-6), draw(tokens, 1536), draw(tokens, 1536), draw(tokens, 1536)
    check(kernels.add_norm(x, more, norm), plain.add_norm(x, more, norm))
    check(kernels.norm_backward(grad, more, x, norm), plain.norm_backward(grad, more, x, norm))
    turns = 6 * torch.rand(tokens, heads.dim // 2, generator=generator, device="cuda")
    all_TW = draw(tokens, (heads.num_queries + 2 * heads.num_keys) * heads.dim)
    three = plain.rotate(all_TW, Angles(turns.cos(), turns.sin()), heads)
    check(kernels.rotate(all_TW, Angles(turns.cos(), turns.sin()), heads), three)
    back = (three, all_TW, Angles(turns.cos(), turns.sin()), heads)
    check(kernels.rotate_backward(*back), plain.rotate_backward(*back))
    both, grad = draw(tokens, 2 * 4864), draw(tokens, 4864)
    check(kernels.gate(both), plain.gate(both))
    check(kernels.gate_backward(grad, both), plain.gate_backward(grad, both))
