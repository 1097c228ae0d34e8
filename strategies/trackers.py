"""The trackers that `track.to` may name: how a run is opened in each, gets its figures, and is closed.

Each package is an extra of its own and is imported when a run uses it. Where a tracker keeps or sends things
is its own setting (`MLFLOW_TRACKING_URI`, `WANDB_MODE`, `TRACKIO_SERVER_URL`), except that TensorBoard writes
to the run folder. None may add what it finds out by itself: host, user, console output, source code.
"""

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedllm.config.key import Scalar
from fedllm.errors import MissingExtraError

PROJECT = "fedllm"  # or experiment: what trackers group runs by, unless their own variable names another


@dataclass(frozen=True)
class RunToTrack:
    """What a tracker is told of a run. `known_as` is what an earlier session's tracker calls it, else ""."""

    name: str
    folder: Path
    keys: Mapping[str, Scalar]
    known_as: str = ""


@dataclass(frozen=True)
class Tracker:
    """An open run: what the tracker calls it, how the figures of a round are sent, and how it ends.

    `close` hears whether the run has completed.
    """

    known_as: str
    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[bool], None]


def open_tensorboard(run: RunToTrack) -> Tracker:
    """Write event files to the run folder: `tensorboard --logdir runs`."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run.folder / "tensorboard"))
    if not run.known_as:
        rows = [f"| `{name}` | `{value}` |" for name, value in run.keys.items()]
        writer.add_text("keys", "\n".join(["| key | value |", "|---|---|", *rows]))

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", log, lambda is_complete: writer.close())


def open_mlflow(run: RunToTrack) -> Tracker:
    """Use the client interface: the fluent one would add the user's name and the path of the program."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    # Its own defaults hold a round up for minutes where its server is away; what is missing is sent later.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    client, run_id = MlflowClient(), run.known_as
    if run_id:
        client.update_run(run_id, status="RUNNING")
    else:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        run_id = client.create_run(experiment, run_name=run.name).info.run_id
        client.log_batch(run_id, params=[Param(name, str(value)) for name, value in run.keys.items()])

    def log(step: int, figures: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000  # shown as when it was measured
        client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def close(is_complete: bool) -> None:
        client.set_terminated(run_id, "FINISHED" if is_complete else "FAILED")

    return Tracker(run_id, log, close)


def open_wandb(run: RunToTrack) -> Tracker:
    """Send to Weights & Biases; `WANDB_MODE=offline` keeps all in the run folder."""
    import wandb

    # Of its own accord it would send console output, host, git remote, machine load and source.
    quiet = {"console": "off", "silent": True, "disable_git": True, "save_code": False, "host": ""}
    settings = wandb.Settings(**quiet, x_disable_meta=True, x_disable_stats=True)
    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=run.known_as or secrets.token_hex(8),
        resume="allow",
        config=dict(run.keys),
        dir=str(run.folder),
        settings=settings,
    )
    # Rounds are an axis of their own: wandb's own step never goes back, and a late figure does.
    session.define_metric("*", step_metric="round")
    return Tracker(
        session.id,
        lambda step, figures: session.log({"round": step, **figures}),
        lambda is_complete: session.finish(exit_code=0 if is_complete else 1),
    )


def open_trackio(run: RunToTrack) -> Tracker:
    """Write to Trackio's own folder, or to the server or Space that its variables name."""
    import trackio

    name = run.known_as or f"{run.name}-{secrets.token_hex(4)}"  # it tells runs apart by name alone
    trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=name,
        config=dict(run.keys),
        resume="allow",
        private=True,
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return Tracker(
        name,
        lambda step, figures: trackio.log(dict(figures), step=step),
        lambda is_complete: trackio.finish(),
    )


OPENERS: Mapping[str, Callable[[RunToTrack], Tracker]] = {
    "tensorboard": open_tensorboard,
    "mlflow": open_mlflow,
    "wandb": open_wandb,
    "trackio": open_trackio,
}


def tracker_names(track_to: str) -> list[str]:
    """Return the trackers that the value of `track.to` names, each once.

    Raises:
        MissingExtraError: the package of one is not installed.
    """
    names = list(dict.fromkeys(part.strip() for part in track_to.split(",") if part.strip()))
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a mere folder of that name, as wandb leaves one
            raise MissingExtraError(f"track.to = {name} needs a package: pip install 'fedllm[{name}]'")
    return names
