"""`evaluation.json` in a run's folder: what `fedllm evaluate` found of its adapter, for reports."""

import json
from pathlib import Path
from typing import Any

from fedllm.config.run_config import RunConfig
from fedllm.files import read_object, write_file
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import RESULT

EVALUATION = "evaluation.json"


def keep(run: Path, report: dict[str, Any]) -> None:
    """Add a report to what is known of a finished run; a task measured again replaces what it gave before.

    The figures are of one adapter, named by its digest: where the run has gone on since, earlier ones go. Of
    a run that is not finished nothing is kept, since its next round has another adapter.
    """
    digest = _published_digest(run)
    if not digest:
        return
    known = read(run)
    tasks = {**known.get("tasks", {}), **report.get("tasks", {})}
    merged = {**known, **report, **({"tasks": tasks} if tasks else {}), "adapter": digest}
    write_file(run / EVALUATION, json.dumps(merged, indent=1) + "\n")


def read(run: Path) -> dict[str, Any]:
    """Return what has been found of a run's adapter; {} where nothing was, or it is damaged."""
    found, digest = read_object(run / EVALUATION), _published_digest(run)
    return found if digest and found.get("adapter") == digest else {}


def _published_digest(run: Path) -> str:
    """Return the digest of a finished run's adapter, "" where it is not finished."""
    return str(read_object(run / RESULT).get("digest", ""))


def may_keep_losses(config: RunConfig) -> bool:
    """Return whether clients' own losses may stand in the folder: they have no noise."""
    privacy = resolve(config).privacy
    return privacy is None or privacy.metrics == "all"
