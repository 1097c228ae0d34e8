"""Attention over one flat row that holds many samples, each attending only to itself.

Registered with transformers as an attention implementation, so modelling code stays untouched: a forward
pass over tokens [1, T] with `cu_seq_lens_q` [Q + 1] computes exactly what separate passes would, without a
padding token and without a [T, T] mask. Samples that begin alike may hold their prefix once: `key_places` [K]
then lists where in T every sequence's keys are, and a sequence's queries stand at the end of its keys.
Tensor suffixes: H head, T token, D feature, Q sequence, L its queries, K its keys.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from fedllm.errors import ModelError

RAGGED_ATTENTION, _LISTENING = "fedllm_ragged", "fedllm_listening"


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

    Raises:
        ModelError: the model caps its scores or uses attention sinks, which this kernel does not do, or does
            not say where samples begin.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ModelError("attention with capped scores or sinks cannot run over a flat row")
    if kwargs.get("cu_seq_lens_q") is None:  # some layers do not pass on what they do not know
        raise ModelError("the model does not tell its attention where samples begin")
    window, places = kwargs.get("sliding_window"), kwargs.get("key_places")
    if places is not None:
        key, value = key.index_select(2, places), value.index_select(2, places)
    if _has_varlen_kernel(query):
        return _varlen(query, key, value, kwargs, scaling, window), None
    attend = attend_padded if query.is_cuda else attend_run_by_run
    return attend(query, key, value, kwargs, scaling, window), None


def attends_by_interface(model: Any) -> bool:
    """Return whether `ragged_attention` could do the model's attention, by its settings."""
    # Chunks are counted from the start of a pass, which short rows would not show.
    has_chunks = getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None
    return bool(model._supports_attention_backend) and not has_chunks


def is_ragged(model: Any) -> bool:
    """Return whether `model` attends by `ragged_attention` at present."""
    return bool(model.config._attn_implementation == RAGGED_ATTENTION)


@dataclass(frozen=True, eq=False)
class Asked:
    """What one layer asks of its attention: the factor of its scores, and how many tokens back it sees."""

    module: Any
    scale: float
    window: int | None


def asked_of_attention(model: Any, device: torch.device) -> list[Asked]:
    """Return what each layer of a model asks of its attention, in order, as heard in a pass of one token."""
    from transformers import AttentionInterface

    asked = []

    def listen(module: Any, query: torch.Tensor, *inputs: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        asked.append(Asked(module, kwargs["scaling"], kwargs.get("sliding_window")))
        return query.transpose(1, 2), None

    AttentionInterface.register(_LISTENING, listen)
    own = model.config._attn_implementation
    model.set_attn_implementation(_LISTENING)
    try:
        with torch.no_grad():
            model.get_decoder()(
                input_ids=torch.zeros(1, 1, device=device, dtype=torch.int64), use_cache=False
            )
    finally:
        model.set_attn_implementation(own)
    heard = asked.copy()
    asked.clear()  # transformers keeps `listen`, and with it whatever is in here
    return heard


@contextmanager
def ragged(model: Any) -> Iterator[None]:
    """Switch `model` to ragged attention, and back to its own."""
    from transformers import AttentionInterface

    AttentionInterface.register(RAGGED_ATTENTION, ragged_attention)
    own = model.config._attn_implementation
    model.set_attn_implementation(RAGGED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _has_varlen_kernel(query: torch.Tensor) -> bool:
    """Return whether torch's variable-length flash attention takes this query (GPU, half precision)."""
    return query.is_cuda and query.dtype in {torch.bfloat16, torch.float16} and _varlen_kernel() is not None


@cache
def _varlen_kernel() -> Any:
    """Return torch's variable-length attention, or None where it is absent or an earlier form of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    options = signature(varlen_attn).parameters.keys()
    if not {"scale", "window_size"} <= options:
        return None
    # Fewer heads of keys than of queries: some versions of torch want to be told, others take them so.
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in options else varlen_attn


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: Mapping[str, Any],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Return attention within samples in one kernel, [1, T, H, D]."""
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    # (left, 0) is causal, the last query at the last key; a window of w reaches w - 1 to the left.
    reach = (-1 if window is None else window - 1, 0)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    places = (kwargs[name] for name in names)
    output = _varlen_kernel()(q, k, v, *places, scale=scaling, window_size=reach)
    return output[None]  # type: ignore[no-any-return]


def attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: Mapping[str, Any],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Return attention within samples, each as long as the longest of the row, in one call: [1, T, H, D].

    For a GPU where no kernel takes samples of many lengths, as in float32: no length is read back.
    """
    begins, key_begins = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    last_query_Q1, last_key_Q1 = ((ends.diff() - 1).clamp(min=0)[:, None] for ends in (begins, key_begins))
    # The sample's own last token stands in for padding: a neighbour's NaN would come through any mask.
    query_QL = torch.arange(kwargs["max_length_q"], device=query.device).minimum(last_query_Q1)
    key_K = torch.arange(kwargs["max_length_k"], device=query.device)
    distance_QLK = (query_QL + last_key_Q1 - last_query_Q1)[:, :, None] - key_K
    mask_QLK = (distance_QLK >= 0) & (distance_QLK < (kwargs["max_length_k"] if window is None else window))

    def padded(tensor: torch.Tensor, begins_Q: torch.Tensor, own_QL: torch.Tensor) -> torch.Tensor:
        places_QL = (begins_Q[:-1, None] + own_QL).clamp(max=tensor.shape[2] - 1)
        return tensor.squeeze(0)[:, places_QL].transpose(0, 1)  # [Q, H, L, D]

    key_QK = key_K.minimum(last_key_Q1)
    output = scaled_dot_product_attention(
        padded(query, begins, query_QL),
        padded(key, key_begins, key_QK),
        padded(value, key_begins, key_QK),
        attn_mask=mask_QLK[:, None],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    token_T = torch.arange(query.shape[2], device=query.device)
    sample_T = torch.searchsorted(begins[1:], token_T, right=True)
    return output.transpose(1, 2)[sample_T, token_T - begins[sample_T]][None]


def attend_run_by_run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: Mapping[str, Any],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Return attention within samples, one call for each run of samples of equal length, [1, T, H, D].

    In float32 at least: in half precision a CPU's kernel takes up to four times as long for short samples.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    sizes = zip(*(kwargs[name].diff().tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k")), strict=True)
    runs = [(*size, len(list(run))) for size, run in groupby(sizes)]  # (queries, keys, number of samples)
    queries, keys = ([run[part] * run[2] for run in runs] for part in (0, 1))
    pieces = (_split(x.to(dtype), n) for x, n in ((query, queries), (key, keys), (value, keys)))
    outputs = []
    for (num_queries, num_keys, number), *run in zip(runs, *pieces, strict=True):
        q, k, v = (tensor.unflatten(1, (number, -1)).transpose(0, 1) for tensor in run)  # [number, H, L, D]
        mask = _mask(num_queries, num_keys, window, q.device)
        options: dict[str, Any] = {"scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
        output = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.to(query.dtype).contiguous()[None]


def _split(tensor: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    """Return a tensor [1, H, T, D] in pieces [H, n, D]; one piece is no copy on the way back."""
    whole = tensor.squeeze(0)
    return whole.split_with_sizes(sizes, dim=1) if len(sizes) > 1 else (whole,)


@lru_cache(maxsize=32)  # a pass has few, and those of long rows are megabytes
def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return which keys a query sees [queries, keys], the last query at the last key; None if simply causal.

    Every layer of a pass asks for the same few.
    """
    reach = num_keys if window is None else window
    if num_queries == num_keys <= reach:
        return None
    with torch.inference_mode(False):  # a mask made while evaluating must serve training too
        position = torch.arange(num_keys, device=device)
        distance = position[-num_queries:, None] - position[None, :]
        return (distance >= 0) & (distance < reach)
