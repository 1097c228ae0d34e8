"""What the server of a run writes to its folder while it goes on, shown as it comes.

Rounds come from `rounds.jsonl`, all else from the server's log: who answered in the round that is being done,
who was lost, and news.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError
from fedllm.messages import ClientFailure
from fedllm.runs.folder import DECISIONS
from scripts.run_view import RunView
from scripts.runtimes.shown_rounds import ShownRounds


class FollowedRun:
    """Shows what is new in a run folder since the last look; at first all rounds, and the one being done."""

    def __init__(self, folder: Path, view: RunView):
        self._view, self._rounds = view, ShownRounds(folder, view)
        self._log, self._place = folder / DECISIONS, 0  # bytes of the log that were read
        self._rounds.show()
        entries = self._read()
        ends = [place for place, entry in enumerate(entries) if entry.get("event") in ("round", "begun")]
        self._hear(entries[ends[-1] :] if ends else entries)

    def look(self) -> None:
        """Show what is new.

        Raises:
            ConfigError: what the server wrote is damaged.
        """
        self._rounds.show()  # first: answers in the log may be of the round after
        self._hear(self._read())

    def _read(self) -> list[dict[str, Any]]:
        """Return the lines of the log that were finished since the last call."""
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(self._place)
            content = file.read()
        finished = content[: content.rfind(b"\n") + 1]
        self._place += len(finished)
        try:
            return [dict(json.loads(line)) for line in finished.splitlines()]
        except (TypeError, ValueError):
            raise self._is_damaged() from None

    def _hear(self, entries: list[dict[str, Any]]) -> None:
        try:
            for entry in entries:
                self._tell(entry)
        except KeyError:
            raise self._is_damaged() from None

    def _is_damaged(self) -> ConfigError:
        return ConfigError(f"{self._log}: damaged; `fedllm log verify {self._log}` says where")

    def _tell(self, entry: Mapping[str, Any]) -> None:
        view = self._view
        match entry["event"]:
            case "notice":
                view.notice(entry["text"])
            case "refused":
                told = {"code": entry["code"], "reason": entry["reason"]}
                view.client(entry["round"], ClientFailure(client_id=entry["client"], **told))
            case "accepted":
                view.phase("training", view.done + 1, view.plan.cohort.size)
            case "round":
                view.phase("", 0, 0)
