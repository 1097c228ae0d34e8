"""One place of a node's code fails, as $FEDLLM_TEST_FAULT says.

What is raised quotes a row of $FEDLLM_TEST_ROWS, as an unforeseen exception may.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from story_places import Place, wrap

FAULT = os.environ["FEDLLM_TEST_FAULT"]


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


def with_broken_tokenizers(encode: Any) -> Any:
    """Return a function as it is, once the tokenizers that it is given panic."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast.__call__ = breaks_on_rows(PreTrainedTokenizerFast.__call__)
    return encode


PLACES: dict[str, tuple[str, Place]] = {  # fault -> module, and what fails in it
    "panic": ("clients.tokens", ("encode_or_cause", with_broken_tokenizers)),
    "crash": ("clients.jobs", ("draw_rows", lambda _: fail)),
    "memory": ("clients.jobs", ("draw_rows", lambda _: fail)),
}
if FAULT in PLACES:
    wrap(dict([PLACES[FAULT]]))
if FAULT == "debug":
    logging.basicConfig(level=logging.DEBUG)
