"""Arithmetic of a language model's training, and the fastest this machine can do it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from fedllm.adapters.layout import AdapterLayout
from fedllm.models.base import target_modules
from fedllm.models.chat import Encoded
from scripts.benchmarks.timing import timed


def gemm_rate(weights: Sequence[torch.Tensor], num_tokens: int) -> float:
    """Return FLOP per second of one pass of `linear` over all `weights` [D_out, D_in], on their own device.

    The weights are a model's own, in its own order, so the pass reads memory as a forward pass does. Seconds
    are those that count there (`Timing.busy`).
    """
    inputs = {weight.shape[1]: weight.new_empty(num_tokens, weight.shape[1]).normal_() for weight in weights}

    @torch.inference_mode()
    def one_pass() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    seconds = timed(one_pass).timing.busy(weights[0].device)
    return sum(2 * num_tokens * weight.numel() for weight in weights) / seconds


def trunk_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of every linear layer of a language model but its head, in its own order."""
    return {name: model.get_submodule(name).weight for name in target_modules(model, "all-linear")}


def useful_flop(model: Any, layout: AdapterLayout, rows: Sequence[Encoded]) -> float:
    """Return the arithmetic of training on `rows`: no padding, no forward pass twice, no unlearnt logit.

    Per token 2 FLOP per trunk weight forward, 2 per weight above the lowest adapter backward (a frozen weight
    has no gradient) and 6 per adapter value; 4 per head weight and learnt token; causal attention. The model
    is of the Llama kind: one width in every layer.
    """
    config, sizes = model.config, {name: weight.numel() for name, weight in trunk_weights(model).items()}
    lowest = list(sizes).index(layout.matrices[0].module)
    above = sum(list(sizes.values())[lowest + 1 :])
    trunk = (2 * sum(sizes.values()) + 2 * above + 6 * layout.size) * sum(len(row.tokens) for row in rows)
    head = 4 * config.vocab_size * config.hidden_size * sum(row.num_supervised for row in rows)
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    attention = 6 * width * sum(len(row.tokens) ** 2 for row in rows)
    return float(trunk + head + attention)
