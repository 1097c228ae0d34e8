"""The base model, tokenizer and engine that a process keeps in memory: loaded on first use, the newest alone.

A base model takes gigabytes and seconds to load, so everything in a process that computes must use the same
one. Whoever starts the process makes one `Resident` and passes it on: the ClientApp to its data holders, and
in a local run to the server's session too.
"""

import ctypes
import gc
from functools import lru_cache
from typing import Any

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.config.keys import ModelConfig
from fedllm.engine.engine import Engine
from fedllm.models.base import BaseModel, ChosenModel, choose_model, load_chosen, load_tokenizer
from fedllm.models.files import ModelFiles, resolve_model
from fedllm.models.tokenizer_fit import check_tokenizer_fits


def give_back_freed() -> None:
    """Give the system the freed blocks that glibc keeps for later; another C library keeps none."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: 0)(0)


class Resident:
    """Hands out what it holds when asked for the same again; another model replaces the one before."""

    def __init__(self) -> None:
        self._tokenizer = lru_cache(maxsize=1)(load_tokenizer)
        self._bases: dict[ChosenModel, BaseModel] = {}  # one at most, as of engines, which hold on to it
        self._engines: dict[tuple[AdapterLayout, int | str], Engine] = {}

    def release(self) -> None:
        """Let go of what is held, and give its memory back to the system."""
        self._engines.clear()
        self._bases.clear()
        self._tokenizer.cache_clear()
        gc.collect()  # models refer to themselves
        torch.cuda.empty_cache()  # nothing where no GPU was used
        give_back_freed()

    def tokenizer(self, files: ModelFiles) -> Any:
        """Return the tokenizer of a model; raises as `load_tokenizer`."""
        return self._tokenizer(files)

    def check_tokenizer(self, model: ModelConfig, max_length: int) -> str:
        """Return a warning about rows of `max_length` tokens, or ""; raises as `check_tokenizer_fits`."""
        files = resolve_model(model.name)
        return check_tokenizer_fits(files, self.tokenizer(files), max_length)

    def base(self, model: ModelConfig) -> BaseModel:
        """Return the base model on its device; raises as `load_base`."""
        chosen = choose_model(model)
        if chosen not in self._bases:
            # Let go of first: a second base model might not fit in memory next to the first.
            self._engines.clear()
            self._bases.clear()
            self._bases[chosen] = load_chosen(chosen, self.tokenizer(chosen.files))
        return self._bases[chosen]

    def engine(self, model: ModelConfig, layout: AdapterLayout, token_budget: int | str = "auto") -> Engine:
        """Return the engine that trains adapters of `layout` on the base model.

        Raises:
            ModelError: the base model cannot be loaded.
            LayoutError: `layout` is of another base model.
        """
        base, key = self.base(model), (layout, token_budget)
        if key not in self._engines:
            self._engines.clear()  # first too: the next one measures how much memory is free
            self._engines[key] = Engine(base, layout, token_budget=token_budget)
        return self._engines[key]
