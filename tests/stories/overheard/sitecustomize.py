"""Loaded by every Python process of a site in a story: it writes down what its clients' updates are.

Into the folder $FEDLLM_TEST_OVERHEARD go each delta as float32, and each vector of a secret sum before it is
masked, packed as it would travel. A test then knows what to look for in all that the server can see.
"""

import hashlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["FEDLLM_TEST_OVERHEARD"])


def kept(content: bytes, form: str) -> None:
    """Write an update into a file of its own."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{hashlib.sha256(content).hexdigest()}.{form}").write_bytes(content)


def overheard_protect(protect: Callable[..., Any]) -> Callable[..., Any]:
    """Return `clients.protect.protect`, with each delta written down."""

    def call(*arguments: Any) -> Any:
        update = protect(*arguments)
        kept(update.delta.float().numpy().tobytes(), "float32")
        return update

    return call


def overheard_mask(mask: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fedllm.secure.masking.mask`, with each vector written down before it is masked."""

    def call(name: str, private: bytes, exchange: Any, words: Any, secret: bytes) -> Any:
        from fedllm.secure.ring import pack

        kept(pack(words), "words")
        return mask(name, private, exchange, words, secret)

    return call


PLACES = {  # module -> (name in it, what takes its place)
    "clients.protect": ("protect", overheard_protect),
    "clients.masks": ("mask", overheard_mask),
}


class Listener(importlib.abc.MetaPathFinder):
    """Lets these modules be loaded, then wraps a function of each."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Return the spec of one of the modules, with a loader that does so; None for others."""
        if name not in PLACES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        load, (place, wrapped) = spec.loader.exec_module, PLACES[name]

        def load_wrapped(module: Any) -> None:
            load(module)
            setattr(module, place, wrapped(getattr(module, place)))

        spec.loader.exec_module = load_wrapped  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Listener())
