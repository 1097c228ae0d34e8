"""How a batch of beginnings is read, and then token after token what its rows write.

Two readers give the same logits. The cache of keys and values of `GrowingReader` grows with every token; any
model can be read so. That of `FixedReader` has its last size from the start, so every token is the same
kernels on the same memory, and a GPU can be given them all at once as a CUDA graph (`recorded`).
Tensor suffixes: B row of the batch, t its token, K key, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedllm.engine.graphs import captured
from fedllm.models.base import BaseModel
from fedllm.models.files import first_line

_logger = logging.getLogger("fedllm.generation")

CPU_ROWS = 32  # of a batch: what is computed of the logits of more would take hundreds of megabytes
_AGREE = 2e-2  # of the norm of the logits: more than 16 bits round, and far less than a lost token changes


class GrowingReader:
    """Reads with a cache that grows; the plain twin of `FixedReader`."""

    def __init__(self, base: BaseModel, beginnings: Sequence[Sequence[int]], most: int):
        self._model, self._cache = base.model, None
        self._inputs_Bt, self._mask_Bt = left_padded(beginnings, 0, base.device)
        self._is_padded = len(set(map(len, beginnings))) > 1
        self._positions_Bt = _positions(self._mask_Bt)

    def first(self) -> torch.Tensor:
        """Return the logits [B, V] of what follows the beginnings."""
        return self._logits()

    def next(self, last_B1: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, V] after one more token of every row."""
        # Models that keep their state elsewhere (Mamba) read all tokens again.
        before = self._inputs_Bt if self._cache is None else self._inputs_Bt[:, :0]
        self._inputs_Bt = torch.cat([before, last_B1], dim=1)
        self._positions_Bt = self._positions_Bt[:, -1:] + 1
        self._mask_Bt = torch.cat([self._mask_Bt, torch.ones_like(self._mask_Bt[:, :1])], dim=1)
        return self._logits()

    def _logits(self) -> torch.Tensor:
        # A forward pass without `generate`: that would apply the model's generation settings to the logits.
        places = {"attention_mask": self._mask_Bt, "position_ids": self._positions_Bt}
        output = self._model(
            input_ids=self._inputs_Bt,
            **(places if self._is_padded else {}),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.get("past_key_values")
        logits_BV: torch.Tensor = output.logits[:, -1]
        return logits_BV


class FixedReader:
    """Reads with a cache that holds all beginnings and `most` new tokens of every row from the start."""

    def __init__(self, base: BaseModel, beginnings: Sequence[Sequence[int]], most: int):
        self._model = base.model
        self._inputs_Bt, self._mask_Bt = left_padded(beginnings, 0, base.device)
        self._cache = _fixed_cache(base.model, self._mask_Bt.shape[1] + most)
        self._positions_B1 = _positions(self._mask_Bt)[:, -1:].clone()
        # The keys of tokens to come are hidden by their places, as in every causal mask.
        self._mask_BK = torch.nn.functional.pad(self._mask_Bt, (0, most), value=1)

    def first(self) -> torch.Tensor:
        """Return the logits [B, V] of what follows the beginnings."""
        return self._logits(self._inputs_Bt, self._mask_Bt, _positions(self._mask_Bt))

    def next(self, last_B1: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, V] after one more token of every row. All that changes, changes in place."""
        return self._logits(last_B1, self._mask_BK, self._positions_B1.add_(1))

    def _logits(self, inputs: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = output.logits[:, -1]
        return logits_BV


@torch.no_grad()
def can_be_fixed(base: BaseModel) -> bool:
    """Return whether a cache of fixed size gives the logits of one that grows, tried on a few tokens."""
    try:
        vocabulary = base.model.config.get_text_config().vocab_size
        tokens = [(7919 * index + 13) % vocabulary for index in range(12)]
        written = torch.tensor([tokens[:3], tokens[3:6]], device=base.device)
        readers = [kind(base, [tokens, tokens[:5]], 3) for kind in (FixedReader, GrowingReader)]
        for step in range(4):
            fixed, grown = (r.next(written[:, step - 1 : step]) if step else r.first() for r in readers)
            if not bool((fixed - grown).norm() <= _AGREE * grown.norm()):
                return False
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False  # the model or its cache refuses
    return True


def _fixed_cache(model: Any, length: int) -> Any:
    """Return a cache that holds `length` keys and values of every layer (transformers.Cache).

    Of a window too: which keys it reaches is left to the mask, since a cache of the window alone moves.

    Raises:
        ValueError: a layer keeps anything else, or attends by chunks.
    """
    from transformers import StaticCache
    from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

    layers = StaticCache(model.config, length).layers
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    kinds = set(map(type, layers))
    if chunk is not None or not kinds <= {StaticLayer, StaticSlidingWindowLayer}:
        raise ValueError
    return Cache(layers=[StaticLayer(length) for _ in layers])


def rows_at_once(base: BaseModel, length: int) -> int:
    """Return how many rows of `length` tokens a batch may have; on a GPU half its free memory decides.

    A row needs room for its keys and values, and for the eight numbers that a choice makes of each logit.
    """
    if base.device.type != "cuda":
        return CPU_ROWS
    config = base.model.config.get_text_config()
    attending = getattr(config, "num_attention_heads", None) or 1  # a model without attention names none
    heads = getattr(config, "num_key_value_heads", None) or attending
    width = getattr(config, "head_dim", None) or config.hidden_size // attending
    kept = 2 * config.num_hidden_layers * heads * width * length * base.dtype.itemsize
    unused = torch.cuda.memory_reserved(base.device) - torch.cuda.memory_allocated(base.device)
    free: int = torch.cuda.mem_get_info(base.device)[0] + unused
    return max(1, free // (2 * int(kept + 8 * 8 * config.vocab_size)))


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return `step`, which has run once, as one CUDA graph, or as it is where it cannot be recorded.

    All that the step changes it must change in place, and it must read nothing back.
    """
    try:
        graph, _ = captured(device, step)
    except RuntimeError as error:
        _logger.warning("texts are written without a CUDA graph, more slowly: %s", first_line(error))
        return step
    replay: Any = graph.replay
    return replay  # type: ignore[no-any-return]


def left_padded(
    rows: Sequence[Sequence[int]], filler: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of tokens as one tensor and its attention mask, both [B, t].

    Padding goes left, so that every row's next token comes last. A tokenizer that has no padding token would
    refuse to do it.
    """
    length = max(map(len, rows))
    inputs_Bt = torch.tensor([[filler] * (length - len(row)) + list(row) for row in rows], device=device)
    mask_Bt = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return inputs_Bt, mask_Bt


def _positions(mask_Bt: torch.Tensor) -> torch.Tensor:
    """Return every token's position. Padding has none, so a row's tokens stand where they would alone."""
    return (mask_Bt.cumsum(dim=1) - 1).clamp(min=0)
