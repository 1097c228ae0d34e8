"""Loaded by every Python process of a story: the values of secret sums are rounded alike in each run.

How a value is rounded follows from secrets and keys, so that without this no two runs have the same bits.
"""

import importlib.abc
import importlib.util
import sys
from typing import Any


def same_stream(*_: Any) -> Any:
    """Return the same numbers for every secret."""
    from fedllm.secure.agreement import Stream

    return Stream(bytes(16))


PLACES = {"clients.parties": ("secret_stream", same_stream)}  # module -> (name in it, what takes its place)


class Fixer(importlib.abc.MetaPathFinder):
    """Lets such a module be loaded, then replaces a name in it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Return the spec of such a module, with a loader that does so; None for others."""
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
