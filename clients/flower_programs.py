"""Flower's programs of a site: `python -m clients.flower_programs supernode|superexec ...`.

As Flower has them, but for two things. A SuperNode asks for its next message sooner: Flower waits three
seconds between two questions, which a round of two messages would spend several times. And it drops a message
whose run ends while it is fetched: Flower keeps it and, once it is answered, pushes that answer in place of
the one to the next run's first question, for which the server then waits.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from flwr.supercore.run import RunNotRunningException

from fedllm.errors import RunFailedError

_POLL_SECONDS = 0.25  # a question costs a node a millisecond, and its SuperLink as much


def main(words: list[str]) -> None:
    """Run the program that the first word names, with the others."""
    name, *sys.argv[1:] = words
    sys.argv[0] = f"flower-{name}"
    if name == "supernode":
        loop: Any = import_module("flwr.supernode.start_client_internal")
        loop.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, _POLL_SECONDS)))
        loop._pull_and_store_message = partial(fetch_message, loop._pull_and_store_message)
        import_module("flwr.supernode.cli").flower_supernode()
    else:
        import_module("flwr.supercore.cli").flower_superexec()


def fetch_message(
    fetch: Callable[..., int | None],
    *,
    pull_object: Callable[..., bytes],
    confirm_message_received: Callable[..., None],
    **others: Any,
) -> int | None:
    """Return the run of the message that Flower's `fetch` stored, None where none was or its run has ended.

    After any error but the one that says so Flower removes what it has stored of a message.
    """
    return fetch(
        pull_object=partial(_fail_plainly, pull_object),
        confirm_message_received=partial(_fail_plainly, confirm_message_received),
        **others,
    )


def _fail_plainly(step: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except RunNotRunningException:
        raise RunFailedError("the run has ended") from None


if __name__ == "__main__":
    main(sys.argv[1:])
