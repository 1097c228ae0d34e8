"""The packages of this project that lie next to `fedllm`: `clients`, `strategies` and `scripts`.

Other projects use those names too. So they are found by where they lie, whatever the current folder or the
search path offers under the same name.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
SIBLINGS = ("clients", "strategies", "scripts")
_put_aside: dict[str, ModuleType] = {}  # modules of ours while the names belong to others


def load_package(name: str) -> None:
    """Import the package `name` that lies next to `fedllm`, whatever else has that name.

    Raises:
        ModuleNotFoundError: it is not there; the installation is incomplete.
    """
    folder = ROOT / name
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
        raise ModuleNotFoundError(f"{name} does not lie next to fedllm; install fedllm again")
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs: it may import its own modules
    spec.loader.exec_module(module)


@contextmanager
def own_packages() -> Iterator[None]:
    """Let the names mean these packages in the block, whatever they mean to the program around it."""
    if all(map(_is_ours, SIBLINGS)):
        yield
        return
    theirs = _taken_out()
    sys.modules.update(_put_aside)
    try:
        for name in SIBLINGS:
            if name not in sys.modules:
                load_package(name)
        yield
    finally:
        _put_aside.update(_taken_out())
        sys.modules.update(theirs)


def _is_ours(name: str) -> bool:
    """Return whether an import of the name gives the package next to this one."""
    module = sys.modules.get(name)
    spec = None if module else find_spec(name)
    places = module.__path__ if module else (spec and spec.submodule_search_locations) or ()
    return str(ROOT / name) in map(str, places)


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in SIBLINGS]
    return {name: sys.modules.pop(name) for name in names}
