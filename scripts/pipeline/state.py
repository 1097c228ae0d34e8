"""What a pipeline remembers: one file, replaced in one step after each of its steps."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedllm.errors import CheckpointError
from fedllm.files import write_file
from fedllm.monitoring.drift import Chart
from scripts.pipeline.gates import Gate

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class PipelineState:
    """Which step is next (a name of `scripts.pipeline.steps.STEPS`) and what it needs to know.

    `cycle` is the number of the newest run and `reason` what triggered it; `rows` and `begun` (seconds since
    1970) are those of its start, `parent` is the version that it started from (0 = the base model) and
    `has_failed` that it gave nothing. `num_rows` is what the last look found. `target` is the version to
    promote or to go back to, `spent` the epsilon of all runs so far. By client there are the last held-out
    losses, their charts and the number of alarms.
    """

    step: str = "watch"
    looks: int = 0
    cycle: int = 0
    reason: str = ""
    has_failed: bool = False
    num_rows: int = 0
    rows: int = 0
    begun: float = 0.0
    parent: int = 0
    target: int = 0
    spent: float = 0.0
    gates: Mapping[str, Gate] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    charts: Mapping[str, Chart] = field(default_factory=dict)
    alarms: Mapping[str, int] = field(default_factory=dict)


def read_state(folder: Path) -> PipelineState:
    """Return the state in a pipeline's folder, the first one where there is none.

    Raises:
        CheckpointError: it is damaged; starting afresh would forget the epsilon that was spent.
    """
    file = folder / STATE
    if not file.exists():
        return PipelineState()
    try:
        values = json.loads(file.read_text())
        values["charts"] = {client: Chart(**chart) for client, chart in values["charts"].items()}
        return PipelineState(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{file}: damaged, or of another version of fedllm; restore it, or begin anew with another"
            " run.folder and registry.folder"
        ) from None


def write_state(folder: Path, state: PipelineState) -> None:
    """Replace the state in a pipeline's folder.

    Raises:
        CheckpointError: it cannot be written; the one before is still there.
    """
    try:
        write_file(folder / STATE, json.dumps(asdict(state), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder / STATE}: cannot be written ({error.strerror})") from None
