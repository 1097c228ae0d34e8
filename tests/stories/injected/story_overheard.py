"""A site writes down what its clients' updates are, where the server cannot look.

Into the folder $FEDLLM_TEST_OVERHEARD go each delta as float32, and each vector of a secret sum before it is
masked, packed as it would travel. A test then knows what to look for in all that the server can see.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from story_places import wrap

FOLDER = Path(os.environ["FEDLLM_TEST_OVERHEARD"])


def keep(content: bytes, form: str) -> None:
    """Write an update into a file of its own."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{hashlib.sha256(content).hexdigest()}.{form}").write_bytes(content)


def overheard_protect(protect: Callable[..., Any]) -> Callable[..., Any]:
    """Return `clients.protect.protect`, with each delta written down."""

    def call(*arguments: Any) -> Any:
        update = protect(*arguments)
        keep(update.delta.float().numpy().tobytes(), "float32")
        return update

    return call


def overheard_mask(mask: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fedllm.secure.masking.mask`, with each vector written down before it is masked."""

    def call(name: str, private: bytes, exchange: Any, words: Any, secret: bytes) -> Any:
        from fedllm.secure.ring import pack

        keep(pack(words), "words")
        return mask(name, private, exchange, words, secret)

    return call


wrap({"clients.protect": ("protect", overheard_protect), "clients.masks": ("mask", overheard_mask)})
