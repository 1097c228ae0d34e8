"""Flower's programs of a site: `python -m clients.flower_programs supernode|superexec ...`.

As Flower has them, but that a SuperNode asks for its next message sooner: Flower waits three seconds between
two questions, which a round of two messages would spend several times.
"""

import sys
import time
from importlib import import_module
from types import SimpleNamespace
from typing import Any

_POLL_SECONDS = 0.25  # a question costs a node a millisecond, and its SuperLink as much


def main(words: list[str]) -> None:
    """Run the program that the first word names, with the others."""
    name, *sys.argv[1:] = words
    sys.argv[0] = f"flower-{name}"
    if name == "supernode":
        loop: Any = import_module("flwr.supernode.start_client_internal")
        loop.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, _POLL_SECONDS)))
        import_module("flwr.supernode.cli").flower_supernode()
    else:
        import_module("flwr.supercore.cli").flower_superexec()


if __name__ == "__main__":
    main(sys.argv[1:])
