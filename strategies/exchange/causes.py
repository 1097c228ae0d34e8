"""Why nodes and clients have no result, in words a person can act on, and short however many there are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from fedllm.errors import PERMANENT_CAUSES

NAMES_SHOWN = 3
CAUSES_SHOWN = 3
MOST_NOTICES = 20  # lines of one phase of a round


def in_words(code: str) -> str:
    """Return what a server says of a code that a node reports."""
    cause = PERMANENT_CAUSES.get(code, "")
    return f"client reports {code}" + (f" ({cause})" if cause else "")


def names(items: Sequence[str]) -> str:
    """Return names parted by commas, a number in place of all but the first few."""
    more = len(items) - NAMES_SHOWN
    return ", ".join(items[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def grouped(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return name -> reason as (names in words, reason), the most frequent reasons first, a few of each."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(names(named), reason) for reason, named in ordered[:CAUSES_SHOWN]]


def by_cause(reasons: Mapping[str, str]) -> str:
    """Return name -> reason in a line, such as "anna, ben: no usable row; cleo: another base model"."""
    more = len(set(reasons.values())) - CAUSES_SHOWN
    shown = [f"{named}: {reason}" for named, reason in grouped(reasons)]
    return "; ".join(shown) + (f"; and {more:,} other causes" if more > 0 else "")


@contextmanager
def few(notice: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Yield `notice` for one phase: after so many lines the rest is only counted, in a line at the end."""
    number = 0

    def count(line: str) -> None:
        nonlocal number
        number += 1
        if number <= MOST_NOTICES:
            notice(line)

    try:
        yield count
    finally:
        if number > MOST_NOTICES:
            notice(f"and {number - MOST_NOTICES:,} more lines like these")
