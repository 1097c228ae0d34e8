"""Whether the engine's own forward pass of a decoder computes what a model does, by its parts and by trying.

A model's name says nothing. Its parts must be those of such a decoder and no others, and each layer tells
what it asks of its attention in a pass. Then a small model of the same class and settings must give the same
states in float32, and the model itself the same losses and gradients under random adapters.
"""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from fedllm.engine.adapter_bank import Bank
from fedllm.engine.decoder import Decoder, DecoderLayer, Layers
from fedllm.engine.device_trial import stands_trial
from fedllm.engine.flat_row import lay_out, predicting_states
from fedllm.engine.head import Head
from fedllm.engine.passes import Item, Passes
from fedllm.engine.pointwise import Heads, Norm, PlainPointwise, Pointwise
from fedllm.engine.probe import neighbours
from fedllm.models.attention import Asked, asked_of_attention, ragged
from fedllm.models.files import first_line
from fedllm.models.side_by_side import lay_side_by_side

_logger = logging.getLogger("fedllm.training")

# Of the norm: how far apart two ways to round may be. In 16 bits the gradients of 30 layers are 5 % apart,
# and each of them 6 % from those of float32.
_HALF, _SINGLE = (2e-2, 0.2), (1e-4, 1e-3)  # losses, gradients
_OWNERS = (0, 1, 1, 0)  # of the rows that are tried: two clients, of whom one has two rows that begin alike


def own_trunk(passes: Passes) -> Decoder | None:
    """Return the own decoder for the model of `passes`, where it pays and both agree; None elsewhere.

    In float32 and float64 on a CPU a model keeps transformers' forward, and with it its bits.
    """
    base = passes.base
    is_wanted = base.device.type == "cuda" or base.dtype.itemsize < 4
    if not (is_wanted and passes.is_ragged and passes.head.weight_VD is not None):
        return None
    try:
        decoder = read_decoder(base.model, passes.bank, _pointwise(base.device))
        if decoder is None or not small_one_agrees(base.model):
            return None
        if computes_the_same(passes, replace(passes, trunk=decoder)):
            return decoder
    except Exception as error:  # of Triton too, whose errors are of many kinds
        _logger.warning("the own forward pass failed (%s): transformers' is used", first_line(error))
    return None


def small_one_agrees(model: Any) -> bool:
    """Return whether the own forward pass is that of a small model of this class and its other settings.

    In float32: the rounding of 16 bits hides a layer that does not rotate, or whose output is scaled by 0.9.
    """
    config = deepcopy(model.config)
    sizes = {"vocab_size": 128, "pad_token_id": None, "intermediate_size": 24, "head_dim": 16}
    for name, value in {**sizes, "hidden_size": 2 * config.num_attention_heads}.items():
        setattr(config, name, value)
    no_adapters: Any = SimpleNamespace(places={}, device=torch.device("cpu"))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small = type(model)(config).float().requires_grad_(False).eval()
        for parameter in small.parameters():  # as large as what is trained: all a layer does then shows
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
        decoder = read_decoder(small, no_adapters, PlainPointwise())
        if decoder is None:
            return False
        flat = lay_out(neighbours(small), no_adapters.device, owners=_OWNERS)
        # Far positions: some models scale the queries there.
        flat = replace(flat, positions_T=flat.positions_T * 10_007)
        with ragged(small):
            expected = predicting_states(small, flat, Head(small.get_output_embeddings().weight))
        return bool((decoder(flat) - expected).norm() <= 1e-3 * expected.norm())


def computes_the_same(expected: Passes, found: Passes) -> bool:
    """Return whether two ways to run a model's passes give the same losses and gradients, up to rounding."""
    bank, device = expected.bank, expected.base.device
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(bank.layout.size, generator=draw) * 0.02 for _ in range(2)]
    bank.load(bank.layout, starts, [1.0, 2.0])
    rows = neighbours(expected.base.model)
    items = [Item(row, owner, owner, 0.1) for row, owner in zip(rows, _OWNERS, strict=True)]
    results = []
    with expected.attached():
        for passes in (expected, found):
            bank.reserve(2)
            losses = passes.losses(items, backward=True).to(device)
            results.append((losses, bank.grad_SP.clone()))
    bounds = _HALF if expected.base.dtype.itemsize < 4 else _SINGLE
    return all(bool((a - b).norm() <= bound * a.norm()) for a, b, bound in zip(*results, bounds, strict=True))


def read_decoder(model: Any, bank: Bank, pointwise: Pointwise) -> Decoder | None:
    """Return the own decoder over a model's weights, or None where its parts are not a decoder's and no more.

    Layers that share an input have their weights laid side by side.
    """
    body = model.get_decoder()
    try:
        asked = asked_of_attention(model, bank.device)
        names = {module: name for name, module in model.named_modules()}
        layers = tuple(_read_layer(*pair, names) for pair in zip(body.layers, asked, strict=True))
        decoder = Decoder(body.embed_tokens, body.rotary_emb, layers, _norm(body.norm), bank, pointwise)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    linears = [joint for layer in layers for joint in _linears(layer)]
    read = [part for joint in linears for part in joint.values()]
    is_plain = all(type(part) is nn.Linear for part in read) and type(body.embed_tokens) is nn.Embedding
    read += [body.embed_tokens, body.norm, *(part for layer in body.layers for part in _norms(layer))]
    used = {id(parameter) for part in read for parameter in part.parameters()}
    if not is_plain or used != {id(parameter) for parameter in body.parameters()}:
        return None
    for joint in linears:
        lay_side_by_side(list(joint.values()))
    return decoder


def _read_layer(layer: Any, asked: Asked, names: Mapping[Any, str]) -> DecoderLayer:
    """Return one layer's parts.

    Raises:
        AttributeError: it has not all of them.
        ValueError: it has them and does not compute with them what a decoder does.
    """
    attention, gated = layer.self_attn, layer.mlp
    if asked.module is not attention or not _is_silu(gated.act_fn):
        raise ValueError
    dim = attention.head_dim
    has_norms = hasattr(attention, "q_norm")
    heads = Heads(
        attention.q_proj.out_features // dim,
        attention.k_proj.out_features // dim,
        dim,
        _norm(attention.q_norm) if has_norms else None,
        _norm(attention.k_norm) if has_norms else None,
    )

    def named(*modules: Any) -> Layers:
        return {names[module]: module for module in modules}

    return DecoderLayer(
        _norm(layer.input_layernorm),
        heads,
        named(attention.q_proj, attention.k_proj, attention.v_proj),
        named(attention.o_proj),
        asked.scale,
        asked.window,
        _norm(layer.post_attention_layernorm),
        named(gated.gate_proj, gated.up_proj),
        named(gated.down_proj),
        attention,
        is_checkpointed=layer.gradient_checkpointing,
    )


def _is_silu(activation: Any) -> bool:
    tried = torch.linspace(-4, 4, 9)
    return torch.allclose(activation(tried), silu(tried))


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _norms(layer: Any) -> list[Any]:
    attention = layer.self_attn
    of_heads = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    return [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]


def _linears(layer: DecoderLayer) -> tuple[Layers, ...]:
    return layer.query_key_value, layer.output, layer.gate_up, layer.down


def _pointwise(device: torch.device) -> Pointwise:
    """Return the steps between the products: in Triton on a GPU that runs it, else in torch."""
    made: list[Pointwise] = [PlainPointwise()]

    def gates_as_torch_does() -> bool:
        from fedllm.engine.triton.pointwise import TritonPointwise

        made.insert(0, TritonPointwise())
        both_TF = torch.linspace(-4, 4, 24, device=device).view(2, 12)
        return torch.allclose(made[0].gate(both_TF), made[1].gate(both_TF), atol=1e-5)

    if device.type == "cuda" and stands_trial(device, "the decoder", gates_as_torch_does):
        return made[0]
    return made[-1]
