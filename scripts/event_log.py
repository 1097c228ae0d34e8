"""What happens to a run as lines of JSON, for a program that collects logs."""

import json
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from fedllm.runs.records import RoundRecord, record_to_dict

# What a line says of a round; `rounds.jsonl` in the run folder has the whole record.
_TOLD = ("attempt", "applied", "mean_held_out", "bytes_up", "bytes_down", "seconds", "adapter")


class EventLog:
    """Prints one line of JSON for each event: its time in UTC, its name, and what it says."""

    def __init__(self, run: str, file: TextIO | None = None):
        self._run, self._file = run, file

    def notice(self, text: str) -> None:
        """Log one line of news."""
        self.event("notice", text=text)

    def record(self, record: RoundRecord) -> None:
        """Log a round that was just done."""
        values = record_to_dict(record)
        told = {name: values[name] for name in _TOLD}
        counts = {"asked": len(record.asked), "accepted": len(record.accepted), "lost": dict(record.codes)}
        spent = {"epsilon": record.privacy.epsilon} if record.privacy else {}
        self.event(
            "round", round=record.round_num, loss=values["training"]["loss"], **told, **counts, **spent
        )

    def replay(self, record: RoundRecord) -> None:
        """Log nothing: the session that did the round has."""

    def event(self, name: str, **values: Any) -> None:
        """Log one event."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, "run": self._run}
        print(json.dumps(line | values, allow_nan=False), file=self._file or sys.stdout, flush=True)
