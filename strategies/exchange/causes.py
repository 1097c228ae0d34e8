"""Why nodes and clients have no result: words a person can act on, short however many there are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from fedllm.errors import PERMANENT_CAUSES, NonFiniteError, RunFailedError
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from strategies.divergence import diverged
from strategies.session import Session

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


def stays(code: str, before: str | None) -> bool:
    """Return whether a client would report a code again; an error that nobody foresaw may pass once."""
    return code in PERMANENT_CAUSES or (code == before and code in ("internal", "out-of-memory"))


def failure_of(session: Session, state: ServerState, record: RoundRecord, attempt: int) -> RunFailedError:
    """Return the error of a round that has failed for good: why, and what is kept."""
    if record.lost and set(record.codes.values()) == {NonFiniteError.code}:
        what = "training gave NaN or infinity at every client that was asked"
        return diverged(session.config, state.records, record.round_num, what)
    words = {client: session.transport.words_of(session.clients[client].node_id) for client in record.lost}
    for client, code in record.codes.items():
        if not words[client]:
            words[client] = in_words(code) if code in PERMANENT_CAUSES else record.lost[client]
    why = by_cause(words)
    times = "once" if attempt == 1 else f"{attempt} times"
    return RunFailedError(
        f"round {record.round_num} failed {times}; the adapter of round {state.round_num} is kept"
        + (f"; {why}" if why else "")
    )
