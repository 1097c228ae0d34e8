"""What the public files of a run folder say: `private/` and the checkpoints are never opened."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.files import read_object
from fedllm.runs.folder import RESULT, read_keys, read_rounds
from fedllm.runs.records import RoundRecord
from fedllm.runs.spread import keep_common_clients
from scripts.auditing.table import REPORT
from scripts.evaluation.kept import read as read_evaluation

UNSHOWN = {"run.name", "run.output", "run.resume", "run.purpose"}  # keys that change no result
Losses = Mapping[str, Mapping[str, float]]  # column -> client -> loss


@dataclass(frozen=True)
class RunFiles:
    """A run as its folder has it; a file that is absent or damaged is an empty mapping."""

    name: str
    keys: Mapping[str, Scalar]
    records: list[RoundRecord]
    result: Mapping[str, Any]
    privacy: Mapping[str, Any]
    audit: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    environment: Mapping[str, str]

    @property
    def rounds(self) -> list[RoundRecord]:
        """The records but for that of the base model."""
        return [record for record in self.records if record.round_num > 0]

    @property
    def measured(self) -> list[RoundRecord]:
        """The records with held-out losses."""
        return [record for record in self.records if record.held_out]

    def ends(self) -> Losses:
        """Held-out losses of the base model and of the last adapter, on the clients measured with both."""
        measured = self.measured
        if len(measured) < 2 or measured[0].round_num:
            return {}
        last = measured[-1]
        columns = {"base": measured[0].held_out, "shared adapter": last.held_out}
        found = keep_common_clients({**columns, "with personal adapter": last.personal_held_out})
        return found if all(found.values()) else {}  # none of the first clients may be there any more

    def at_home(self) -> Losses:
        """Losses alone, of the shared adapter and at home, all on one half of the held-out rows."""
        record = next((record.at_home for record in reversed(self.records) if record.at_home), None)
        if record is None or not record.home:
            return {}
        columns = {"alone": record.alone, "shared adapter": record.shared, "at home": record.home}
        return keep_common_clients(columns)

    @property
    def is_private(self) -> bool:
        """Whether the run has a privacy plan."""
        return self.keys.get("privacy.epsilon", "off") != "off"

    @property
    def statement(self) -> Mapping[str, Any]:
        """The privacy statement of a complete run; that of an earlier session would promise too much."""
        return self.privacy if self.result.get("status") == "completed" else {}

    def changed_keys(self) -> dict[str, str]:
        """What was set to another value than the default; of a path only its last part."""
        usual = RunConfig().to_flat()
        changed = {key: value for key, value in self.keys.items() if usual.get(key) != value}
        return {key: shown_value(value) for key, value in changed.items() if key not in UNSHOWN}


def read_run(folder: Path) -> RunFiles:
    """Return what is in a run folder.

    Raises:
        ConfigError: it is no run folder, or no round has been written yet.
    """
    keys = read_keys(folder)
    return RunFiles(
        name=str(keys.get("run.name", folder.name)),
        keys=keys,
        records=read_rounds(folder),
        result=read_object(folder / RESULT),
        privacy=read_object(folder / "privacy.json"),
        audit=read_object(folder / REPORT),
        evaluation=read_evaluation(folder),
        environment=read_object(folder / "environment.json"),
    )


def shown_value(value: Scalar) -> str:
    """Return a value of a key without the folders of this machine; it may name several paths."""
    return re.sub(r"(?<![^,+\s])[/~.][^,]*/", "…/", str(value))
