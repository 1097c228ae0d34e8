"""Wraps names of our modules as these are loaded, so that a story changes a process and no file of ours."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

Place = tuple[str, Callable[[Any], Any]]  # a name in a module, and what makes of its value another


class Wrapper(importlib.abc.MetaPathFinder):
    """Lets the modules in `places` be loaded, then wraps a name in each."""

    def __init__(self, places: Mapping[str, Place]):
        self.places = places

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Return the spec of one of the modules, with a loader that does so; None for others."""
        if name not in self.places:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        load, (place, wrapped) = spec.loader.exec_module, self.places[name]

        def load_wrapped(module: Any) -> None:
            load(module)
            setattr(module, place, wrapped(getattr(module, place)))

        spec.loader.exec_module = load_wrapped  # type: ignore[method-assign]
        return spec


def wrap(places: Mapping[str, Place]) -> None:
    """Wrap these names, by module, in this process."""
    sys.meta_path.insert(0, Wrapper(places))
