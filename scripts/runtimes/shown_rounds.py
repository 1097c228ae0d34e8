"""The rounds that a run of another process writes to its folder, shown as they come."""

from pathlib import Path
from typing import Protocol

from fedllm.runs.folder import ROUNDS, read_round
from fedllm.runs.records import RoundRecord


class View(Protocol):
    """Where a person or a program hears of a run."""

    def notice(self, text: str) -> None:
        """Hear one line of news."""

    def record(self, record: RoundRecord) -> None:
        """Hear of a round that was just done."""

    def replay(self, record: RoundRecord) -> None:
        """Hear of a round of an earlier session."""


class ShownRounds:
    """Shows each round in a run folder once; those there from the start are of an earlier session."""

    def __init__(self, folder: Path, view: View):
        self._file, self._view = folder / ROUNDS, view
        self._num_old, self._shown, self._seen = len(self._lines()), 0, (0, 0)

    def show(self) -> bool:
        """Show what is new, and return whether there was any.

        Raises:
            ConfigError: a line is damaged.
        """
        if not self._file.exists() or version_of(self._file) == self._seen:
            return False
        self._seen = version_of(self._file)
        lines, before = self._lines(), self._shown
        for place, line in enumerate(lines[before:], before):
            show = self._view.replay if place < self._num_old else self._view.record
            show(read_round(self._file.parent, line))
        self._shown = max(before, len(lines))
        return self._shown > before

    def _lines(self) -> list[str]:
        return self._file.read_text().splitlines() if self._file.exists() else []


def version_of(file: Path) -> tuple[int, int]:
    """Return what tells one version of a growing file from the next; its time alone may be too coarse."""
    found = file.stat()
    return found.st_mtime_ns, found.st_size
