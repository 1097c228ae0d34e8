"""What the log of a registry says: which versions there are, where each alias points, which are marked.

    added        a version: the SHA-256 of its signature file, the key that signed it, a mark it inherits
    promoted     an alias points to a version from here on
    rolled-back  an alias points again to a version that it pointed to before
    marked       a version is kept but never promoted again, and why

Any other event is a note, such as an alarm, and changes nothing here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedllm.errors import IntegrityError

ADDED, PROMOTED, ROLLED_BACK, MARKED = "added", "promoted", "rolled-back", "marked"
EVENTS = (ADDED, PROMOTED, ROLLED_BACK, MARKED)


@dataclass(frozen=True)
class Added:
    """What the log says of a version: the SHA-256 of its signature file, and the public key of its signer.

    `lineage` is the SHA-256 of what the server keeps of its run, "" where there was no run.
    """

    digest: str
    signer: str
    lineage: str = ""


@dataclass(frozen=True)
class History:
    """The state of a registry after some of its log.

    `pointed` holds for each alias the versions it pointed to, the current one last; what a rollback left is
    not among them. `marks` holds the reason of each marked version.
    """

    added: Mapping[int, Added] = field(default_factory=dict)
    pointed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    marks: Mapping[int, str] = field(default_factory=dict)

    @property
    def current(self) -> dict[str, int]:
        """The version that each alias points to."""
        return {alias: numbers[-1] for alias, numbers in self.pointed.items()}

    @property
    def next_number(self) -> int:
        """The number of the version that is added next."""
        return len(self.added) + 1

    def earlier(self, alias: str) -> int | None:
        """Return the version that `alias` pointed to before the current one, marked ones left out."""
        *past, current = self.pointed.get(alias, (0,))
        return next((each for each in reversed(past) if each != current and each not in self.marks), None)


def history_of(entries: Iterable[Mapping[str, Any]]) -> History:
    """Return the state after the entries of a log.

    Raises:
        IntegrityError: an entry is not one that a registry writes; its line is named.
    """
    history = History()
    for line, entry in enumerate(entries, 1):
        try:
            history = _after(history, entry)
        except (KeyError, TypeError, ValueError):
            raise IntegrityError(
                f"line {line}: no registry writes this entry after those before it"
            ) from None
    return history


def _after(history: History, entry: Mapping[str, Any]) -> History:
    event = entry["event"]
    if event not in EVENTS:
        return history
    number = entry["version"]
    if event == ADDED:
        if number != history.next_number:
            raise ValueError
        added = Added(*(str(entry[name]) for name in ("digest", "signer", "lineage")))
        marks = {**history.marks, number: str(entry["mark"])} if "mark" in entry else history.marks
        return replace(history, added={**history.added, number: added}, marks=marks)
    history.added[number]  # only a version that is there can be promoted or marked
    if event == MARKED:
        return replace(history, marks={**history.marks, number: str(entry["reason"])})
    numbers = history.pointed.get(entry["alias"], ())
    if event == ROLLED_BACK:
        numbers = numbers[: len(numbers) - numbers[::-1].index(number)]
    else:
        numbers = (*numbers, number)
    return replace(history, pointed={**history.pointed, entry["alias"]: numbers})
