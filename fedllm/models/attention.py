"""Attention over one flat row that holds many samples, each attending only to itself.

Registered with transformers as an attention implementation, so modelling code stays untouched: a forward
pass over tokens [1, T] with `cu_seq_lens_q` [N + 1] computes exactly what N separate passes would, without
a padding token and without a [T, T] mask. Tensor suffixes: H head, T token, D feature.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

RAGGED_ATTENTION = "fedllm_ragged"


def ragged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sample of the row; query [1, H, T, D], key and value [1, H_kv, T, D].

    Returns ([1, T, H, D], None) as transformers' attention interface requires.
    """
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    window = kwargs.get("sliding_window")
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    samples = (torch.split(tensor, lengths, dim=2) for tensor in (query, key, value))
    for q, k, v in zip(*samples, strict=True):
        mask = _window_mask(q.shape[2], window, q.device)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the causal mask [T, T] of a sliding window, or None where plain causality is the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def supports_ragged(model: Any) -> bool:
    """Return whether the architecture can attend over a flat row.

    Models with soft-capped scores or attention sinks, and models that do not use transformers' attention
    interface, cannot; the engine feeds them one sample at a time through their own attention.
    """
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return bool(model._supports_attention_backend) and not capped and config.model_type != "gpt_oss"


@contextmanager
def ragged(model: Any) -> Iterator[None]:
    """Switch `model` to ragged attention where it supports it, and back to its own."""
    if not supports_ragged(model):
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(RAGGED_ATTENTION, ragged_attention)
    own = model.config._attn_implementation
    model.set_attn_implementation(RAGGED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
