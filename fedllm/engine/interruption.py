"""Who waits for training may watch its steps, and end it between two of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

# Called with the steps that are done and those there are; what it raises ends the training.
Watch: TypeAlias = Callable[[int, int], None]

_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched_steps(watch: Watch) -> Iterator[None]:
    """Within the block, and in this thread, `watch` too is called before every optimizer step."""
    outer = _watch.get()

    def all_watch(num_done: int, num_steps: int) -> None:
        if outer is not None:
            outer(num_done, num_steps)
        watch(num_done, num_steps)

    token = _watch.set(all_watch)
    try:
        yield
    finally:
        _watch.reset(token)


def step_begins(num_done: int, num_steps: int) -> None:
    """Tell the watcher, if any, that a step begins."""
    if (watch := _watch.get()) is not None:
        watch(num_done, num_steps)
