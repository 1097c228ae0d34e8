"""What is left of a run that was stopped, or had ended before."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.config.run_config import RunConfig
from fedllm.runs.checkpoint import newest_round
from fedllm.runs.folder import CHECKPOINTS, RESULT
from scripts.command_line import StoppedError, again


def complete_rounds(folder: Path, config: RunConfig) -> int:
    """Return how many rounds the run in `folder` has done, 0 while it is not complete."""
    try:
        result = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):  # it was interrupted
        return 0
    is_complete = isinstance(result, dict) and result.get("status") == "completed"
    rounds = int(result.get("rounds", 0)) if is_complete and (folder / "adapter").is_dir() else 0
    return rounds if rounds >= config.federation.num_rounds else 0


@contextmanager
def told_how_to_go_on(folder: Path, *words: str) -> Iterator[None]:
    """Where a signal stops the run, say which round is saved and what to type to go on: `words` added.

    Raises:
        StoppedError: a signal came.
    """
    try:
        yield
    except KeyboardInterrupt:
        done = newest_round(folder / CHECKPOINTS)
        kept = f"round {done} is saved" if done else "no round was complete yet"
        raise StoppedError(f"stopped; {kept}; go on with: {again(*words)}") from None
