"""The entry of the `fedllm` command and of `python -m fedllm`.

The command lives in `scripts`, and only the packages next to this one are meant (`fedllm.siblings`).
"""

from importlib import import_module

from fedllm.siblings import SIBLINGS, load_package


def main() -> None:
    """Run the command line."""
    for name in SIBLINGS:
        load_package(name)
    import_module("scripts.cli").main()  # not a static import: fedllm knows no other package of this project


if __name__ == "__main__":
    main()
