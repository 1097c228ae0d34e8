"""How often servers have asked: counted on disk over all runs and servers, before an answer is made.

One file for each data set, since what matters is what was told of it, whoever it was told to. A question that
fails half-way stays counted: it may have told something.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedllm.errors import CheckpointError, PolicyError, QueryLimitError
from fedllm.files import make_private_folder, write_file
from fedllm.site_policy import Limits

SECONDS_A_DAY = 86_400.0


@dataclass(frozen=True)
class RunCount:
    """What one run has asked of a data set; `begun` is when it first did, in seconds since 1970.

    `trainings` counts the train requests, `updates` those that an update was the answer to.
    """

    begun: float
    steps: int = 0
    trainings: int = 0
    updates: int = 0
    overlaps: int = 0


@dataclass(frozen=True)
class Asked:
    """What was asked of a data set: by each run, and when losses and overlaps were."""

    runs: Mapping[str, RunCount] = field(default_factory=dict)
    evaluations: tuple[float, ...] = ()
    overlaps: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asking:
    """One question as it counts: of which run, what it is, how many steps it takes, and when it came.

    `is_measured` says that the answer holds held-out losses.
    """

    run: str
    action: str  # join | train | unmask | evaluate | overlap | adapt
    steps: int
    is_measured: bool
    now: float


def count_run(asked: Asked, run: str, now: float, limits: Limits) -> Asked:
    """Return what was asked with a run that asks at `now`; one that has begun changes nothing.

    Raises:
        PolicyError: it is one run more than the owner permits.
    """
    if run in asked.runs:
        return asked
    since = now - limits.period_days * SECONDS_A_DAY
    if 0 < limits.runs <= sum(one.begun > since for one in asked.runs.values()):
        raise PolicyError(f"[limits] runs = {limits.runs} in {limits.period_days:g} days have begun")
    return replace(asked, runs={**asked.runs, run: RunCount(now)})


def count(asked: Asked, asking: Asking, limits: Limits) -> Asked:
    """Return what was asked with one question more.

    Raises:
        PolicyError: it is of one run more, or of more work of one run, than the owner permits.
        QueryLimitError: of such questions as many as the owner permits came in the period already.
    """
    since = asking.now - limits.period_days * SECONDS_A_DAY
    evaluations, overlaps = (
        tuple(time for time in times if time > since) for times in (asked.evaluations, asked.overlaps)
    )
    asked = count_run(asked, asking.run, asking.now, limits)
    run = asked.runs[asking.run]
    if asking.action in ("train", "adapt"):
        trainings = run.trainings + (asking.action == "train")  # `rounds` bounds those alone
        run = replace(run, trainings=trainings, steps=run.steps + asking.steps)
        if 0 < limits.rounds < run.trainings:
            raise PolicyError(f"[limits] rounds = {limits.rounds}: so many times this run has trained")
        if 0 < limits.run_steps < run.steps:
            raise PolicyError(f"[limits] run-steps = {limits.run_steps}: this run would take {run.steps}")
    if asking.is_measured:
        evaluations = _with(evaluations, asking.now, limits.evaluations, "evaluations", limits.period_days)
    if asking.action == "overlap":
        run = replace(run, overlaps=run.overlaps + 1)
        if run.overlaps > run.updates:
            raise QueryLimitError("this run has asked about its texts as often as this site trained in it")
        overlaps = _with(overlaps, asking.now, limits.overlaps, "overlaps", limits.period_days)
    return Asked({**asked.runs, asking.run: run}, evaluations, overlaps)


def count_update(asked: Asked, run: str) -> Asked:
    """Return what was asked after an update has been the answer to a train request of a run."""
    known = asked.runs[run]
    return replace(asked, runs={**asked.runs, run: replace(known, updates=known.updates + 1)})


def count_on_disk(folder: Path, data_set: str, change: Callable[[Asked], Asked]) -> None:
    """Replace what was asked of a data set by what `change` makes of it; it is on disk then.

    Whoever else counts waits. What `change` raises leaves the count as it was.

    Raises:
        CheckpointError: the count is damaged or cannot be written, so how often was asked is not known.
    """
    name = hashlib.sha256(data_set.encode()).hexdigest()[:32]  # a path is no file name
    file = folder / f"{name}.json"
    try:
        make_private_folder(folder)
        with file.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, or with its process
            before = _read(json.loads(file.read_text())) if file.exists() else Asked()
            after = change(before)
            if after is not before:
                write_file(file, json.dumps(asdict(after)) + "\n")
    except (QueryLimitError, PolicyError):  # both are OSErrors too
        raise
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written: {error.strerror}; let this user write") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file} is damaged; how often was asked is not known: restore it") from None


def _with(times: tuple[float, ...], now: float, most: int, name: str, days: float) -> tuple[float, ...]:
    if 0 < most <= len(times):
        raise QueryLimitError(f"[limits] {name} = {most} in {days:g} days are used up")
    return (*times, now)


def _read(values: Mapping[str, Any]) -> Asked:
    runs = {str(name): RunCount(**run) for name, run in values["runs"].items()}
    return Asked(runs, tuple(values["evaluations"]), tuple(values["overlaps"]))
