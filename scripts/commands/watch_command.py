"""`fedllm watch`: a run that another process does, followed in its folder until it ends."""

import json
import time
from pathlib import Path
from typing import Any

import typer

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.files import is_locked
from fedllm.monitoring.run_metrics import write_run_metrics
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import DECISIONS, RESULT, ROUNDS, STARTER, WRITER, read_keys, read_rounds
from scripts.command_line import StoppedError
from scripts.console import Console
from scripts.finished_run import resume_command
from scripts.followed_run import FollowedRun
from scripts.run_view import RunView
from scripts.runtimes.shown_rounds import version_of

_PAUSE_SECONDS = 0.2  # between two looks at the folder
_MOST_LOOKS = 6  # at which nobody does the run before it counts as ended: a server may be starting again


def watch(folder: Path, *, metrics: Path | None = None, as_json: bool) -> None:
    """Show a run as `fedllm run` does, and exit as it ends: with 0 where it completed, else with 1.

    `metrics` is a file that has its figures after every round, in the OpenMetrics format.

    Raises:
        ConfigError: there is no run in `folder`, or one of another version.
        StoppedError: a signal came; the run goes on.
    """
    if not any((folder / name).exists() for name in (STARTER, WRITER, DECISIONS)):
        raise ConfigError(f"{folder}: not a run folder; name one, such as runs/run")
    console = Console(quiet=as_json)
    try:
        follow(folder, console, metrics)
    except KeyboardInterrupt:
        raise StoppedError("no longer watched; the run goes on") from None
    result = _result_of(folder)
    if as_json:
        print(json.dumps(result))
    elif result["status"] == "completed":
        console.summary(folder, result)
    else:
        console.paragraph(f"{result['status']}: {result['reason']}", indent=0)
    if result["status"] != "completed":
        raise typer.Exit(1)


def follow(folder: Path, console: Console, metrics: Path | None = None) -> None:
    """Show what the run in `folder` writes until nobody does it any more, and keep `metrics` up to date.

    Raises:
        ConfigError: the file of the metrics cannot be written.
    """
    file = folder / "config.toml"
    if not file.exists():
        console.line("not begun yet: waiting until its clients have joined")
    while not file.exists() and is_done_by_somebody(folder):
        time.sleep(_PAUSE_SECONDS)
    if not file.exists():
        return
    view = RunView(console, resolve(RunConfig.from_flat(read_keys(folder))))
    seen = (0, 0)  # the version of the rounds that the metrics are of
    with view.showing():
        followed, is_done = FollowedRun(folder, view), False
        while not is_done:
            is_done = not is_done_by_somebody(folder)  # before the last look, which then misses nothing
            followed.look()
            seen = _measure(folder, metrics, seen)
            time.sleep(_PAUSE_SECONDS * (not is_done))


def _measure(folder: Path, metrics: Path | None, seen: tuple[int, int]) -> tuple[int, int]:
    """Write the metrics of the rounds where there are other ones than were seen; return what is seen now."""
    rounds = folder / ROUNDS
    if metrics is None or not rounds.exists() or (found := version_of(rounds)) == seen:
        return seen
    try:
        write_run_metrics(metrics, folder.resolve().name, read_rounds(folder))
    except OSError as error:
        raise ConfigError(f"--metrics {metrics}: cannot be written ({error.strerror})") from None
    return found


def is_done_by_somebody(folder: Path) -> bool:
    """Return whether a process holds the run, at one of several looks."""
    for look in range(_MOST_LOOKS):
        time.sleep(_PAUSE_SECONDS * bool(look))
        if any(is_locked(folder / name) for name in (STARTER, WRITER)):
            return True
    return False


def _result_of(folder: Path) -> dict[str, Any]:
    """Return `result.json`, or where the run left none what may be said of it."""
    try:
        found: dict[str, Any] = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return {
            "status": "interrupted",
            "reason": f"nobody does it any more; to go on: {resume_command(folder)}",
        }
    return found
