"""Loaded by every Python process of a node in a story; breaks one place in it, as $FEDLLM_TEST_FAULT says.

What is raised quotes a row of $FEDLLM_TEST_ROWS, as an unforeseen exception may.
"""

import importlib.abc
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULT = os.environ.get("FEDLLM_TEST_FAULT", "")
PLACES = {  # fault -> (module, name in it that fails)
    "panic": ("clients.tokens", "PreTrainedTokenizerFast"),
    "crash": ("clients.jobs", "draw_rows"),
    "memory": ("clients.jobs", "draw_rows"),
}


class PanicException(BaseException):
    """What Rust code that panics raises: no `Exception`."""


ERRORS = {"panic": PanicException, "crash": ValueError, "memory": MemoryError}


def fail(*arguments: Any, **options: Any) -> Any:
    """Fail as native code does: it prints its message by itself, and raises it."""
    row = Path(os.environ["FEDLLM_TEST_ROWS"]).read_text()
    if FAULT == "panic":
        os.write(2, f"thread panicked at {row}\n".encode())
    raise ERRORS[FAULT](f"cannot handle {row}") from ValueError(row)


def breaks_on_rows(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a tokenizer's call that fails on the text of a row alone: others are read before it."""

    def encode(self: Any, text: Any, *arguments: Any, **options: Any) -> Any:
        return (fail if "canary" in str(text) else call)(self, text, *arguments, **options)

    return encode


class Breaker(importlib.abc.MetaPathFinder):
    """Lets a module be loaded, then breaks it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Return the spec of the module to break, with a loader that does so; None for others."""
        module_name, place = PLACES[FAULT]
        if name != module_name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_break(module: Any) -> None:
            load(module)
            if FAULT == "panic":
                from transformers import PreTrainedTokenizerFast

                PreTrainedTokenizerFast.__call__ = breaks_on_rows(PreTrainedTokenizerFast.__call__)
            else:
                setattr(module, place, fail)

        spec.loader.exec_module = load_and_break  # type: ignore[method-assign]
        return spec


if FAULT in PLACES:
    sys.meta_path.insert(0, Breaker())
if FAULT == "debug":
    logging.basicConfig(level=logging.DEBUG)
