"""Loaded by every Python process of a story: secrets and labels of secret sums are the same in each run.

They decide how a value is rounded, so that without this no two runs have the same bits.
"""

import hashlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path
from typing import Any


def secret_of(path: Path) -> bytes:
    """Return a secret that follows from the client and from what it is for."""
    return hashlib.sha256(f"{path.parent.name} {path.name}".encode()).digest()


PLACES = {  # module -> (name in it, what takes its place)
    "clients.run_keys": ("kept_secret", secret_of),
    "strategies.secure.asked_sums": ("token_bytes", bytes),
}


class Fixer(importlib.abc.MetaPathFinder):
    """Lets these modules be loaded, then replaces a name in each."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Return the spec of one of the modules, with a loader that does so; None for others."""
        if name not in PLACES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        load, (place, fixed) = spec.loader.exec_module, PLACES[name]

        def load_fixed(module: Any) -> None:
            load(module)
            setattr(module, place, fixed)

        spec.loader.exec_module = load_fixed  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Fixer())
