"""The engine's own forward pass of a decoder: Llama, Mistral, Qwen2, Qwen3 and what is built as they are.

It computes what the model's modelling code in transformers does, with fewer and larger steps: query, key and
value are one product, as are gate and up, and what lies between the products is one step each
(`fedllm.engine.pointwise`). Weights and rotation are the model's own. The twin is transformers' forward
(`fedllm.engine.flat_row.predicting_states`); `fedllm.engine.decoder_probe` takes it only where both agree.
Tensor suffixes: T token, N supervised token, D feature, I input feature, H head, E feature of a head,
F feature of the gated layer, W all heads' features of query, key and value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from fedllm.engine.adapter_bank import Bank
from fedllm.engine.flat_row import FlatRow
from fedllm.engine.kernels import adapted_output
from fedllm.engine.pointwise import (
    Angles,
    Heads,
    Norm,
    Pointwise,
    add_normed,
    gated,
    normed,
    rotated,
)
from fedllm.models.attention import ragged_attention
from fedllm.models.side_by_side import joined_linear

Layers = Mapping[str, Any]  # nn.Linear by its name in the model; they share one input


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One layer: attention and a gated layer, each after a norm and added to the stream."""

    attention_norm: Norm
    heads: Heads
    query_key_value: Layers
    output: Layers
    scale: float  # of attention's scores
    window: int | None  # how many tokens back it sees, itself included; None for all
    gate_norm: Norm
    gate_up: Layers
    down: Layers
    attention: Any  # transformers' module, which attention implementations are given
    is_checkpointed: bool  # computed again in the backward pass, so that nothing inside it is kept


@dataclass(frozen=True, eq=False)
class Decoder:
    """A trunk: gives the states that predict a flat row's learnt tokens, under the adapters of a bank."""

    embedding: Any  # nn.Embedding
    rotation: Any  # transformers' module: positions to cosines and sines
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    bank: Bank
    pointwise: Pointwise

    def __call__(self, flat: FlatRow) -> torch.Tensor:
        """Return the states [N, D]."""
        x_TD = embedding(flat.tokens_T, self.embedding.weight)
        angles = self._angles(flat, self.layers[0].heads.dim)
        more_TD: torch.Tensor | None = None
        for layer in self.layers:
            inputs = (layer, x_TD, more_TD, angles, flat)
            if layer.is_checkpointed and torch.is_grad_enabled():
                x_TD, more_TD = checkpoint(
                    self._layer, *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_TD, more_TD = self._layer(*inputs)
        ended_TD = x_TD if more_TD is None else x_TD + more_TD
        return normed(ended_TD[flat.predicting_N], self.norm, self.pointwise)

    def _angles(self, flat: FlatRow, dim: int) -> Angles:
        """Return every token's rotation, from the model's own module; it rounds to the dtype it is shown."""
        shown = torch.empty(0, device=flat.tokens_T.device)
        cos, sin = self.rotation(shown, flat.positions_T[None])
        return Angles(*(values[0, :, : dim // 2].contiguous() for values in (cos, sin)))

    def _layer(
        self,
        layer: DecoderLayer,
        x_TD: torch.Tensor,
        more_TD: torch.Tensor | None,
        angles: Angles,
        flat: FlatRow,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (stream, what is still to be added to it) after a layer, given the same before it.

        The addition is left to the next norm, which reads the sum anyway.
        """
        x_TD, normed_TD = self._add_norm(x_TD, more_TD, layer.attention_norm)
        all_TW = self._product(normed_TD, layer.query_key_value)
        seen_TD = self._attend(all_TW, layer, angles, flat)
        x_TD, normed_TD = self._add_norm(x_TD, self._product(seen_TD, layer.output), layer.gate_norm)
        gated_TF = gated(self._product(normed_TD, layer.gate_up), self.pointwise)
        return x_TD, self._product(gated_TF, layer.down)

    def _add_norm(
        self, x_TD: torch.Tensor, more_TD: torch.Tensor | None, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if more_TD is None:  # before the first layer
            return x_TD, normed(x_TD, norm, self.pointwise)
        return add_normed(x_TD, more_TD, norm, self.pointwise)

    def _attend(
        self, all_TW: torch.Tensor, layer: DecoderLayer, angles: Angles, flat: FlatRow
    ) -> torch.Tensor:
        """Return what each token reads of its own row, all heads side by side, [T, H E]."""
        three = rotated(all_TW, angles, layer.heads, self.pointwise)
        query, key, value = (heads_THE.transpose(0, 1)[None] for heads_THE in three)
        output, _ = ragged_attention(
            layer.attention,
            query,
            key,
            value,
            None,
            scaling=layer.scale,
            sliding_window=layer.window,
            **flat.attention_inputs(),
        )
        return output.view(len(all_TW), -1)

    def _product(self, x_TI: torch.Tensor, layers: Layers) -> torch.Tensor:
        """Return the outputs of linear layers of one input and of their adapters, side by side."""
        group = tuple(self.bank.places[name] for name in layers if name in self.bank.places)
        frozen = joined_linear(list(layers.values()))
        if frozen is None or 0 < len(group) < len(layers):  # a base delta on some, or adapters
            return torch.cat([self._product(x_TI, {name: layers[name]}) for name in layers], dim=1)
        if not group:
            return linear(x_TI, frozen.weight_OI, frozen.bias_O)
        return adapted_output(x_TI, frozen, self.bank, group)
