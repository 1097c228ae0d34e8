"""`evaluation.json` in a run's folder: what `fedllm evaluate` found of it, for reports."""

import json
from pathlib import Path
from typing import Any

from fedllm.config.run_config import RunConfig
from fedllm.files import write_file
from fedllm.plan.run_plan import resolve

EVALUATION = "evaluation.json"


def keep(run: Path, report: dict[str, Any]) -> None:
    """Add a report to what is known of a run; a task measured once more replaces what it gave before."""
    known = read(run)
    tasks = {**known.get("tasks", {}), **report.get("tasks", {})}
    merged = {**known, **report, **({"tasks": tasks} if tasks else {})}
    write_file(run / EVALUATION, json.dumps(merged, indent=1) + "\n")


def read(run: Path) -> dict[str, Any]:
    """Return what has been found of a run; {} where nothing was, or it is damaged."""
    try:
        found = json.loads((run / EVALUATION).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def may_keep_losses(config: RunConfig) -> bool:
    """Return whether clients' own losses may stand in the folder: they have no noise."""
    privacy = resolve(config).privacy
    return privacy is None or privacy.metrics == "all"
