"""The entry of the `fedllm` command and of `python -m fedllm`.

The command lives in `scripts`, a name that other folders use too. So the packages that lie next to this one
are loaded by their own location, before the current folder or the search path can offer others.
"""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIBLINGS = ("clients", "strategies", "scripts")


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


def main() -> None:
    """Run the command line."""
    for name in SIBLINGS:
        load_package(name)
    import_module("scripts.cli").main()  # not a static import: fedllm knows no other package of this project


if __name__ == "__main__":
    main()
