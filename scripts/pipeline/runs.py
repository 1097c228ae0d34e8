"""The runs of a pipeline: those that train, and looks, which only measure what is in use."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedllm.chained_log import read_entries
from fedllm.runs.folder import DECISIONS, START
from scripts.pipeline.gates import gate_figures
from scripts.pipeline.settings import Settings

LOOK = "look"  # the name of the run that measures; each replaces the one before
# Does the run that words describe, as `fedllm run` takes them; a run that is complete stays as it is.
Federate: TypeAlias = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Look:
    """What clients said: held-out losses (nats per token) of those whose sites let them out, and all rows."""

    losses: Mapping[str, float]
    num_rows: int


def look_at(federate: Federate, settings: Settings, adapter: Path | None) -> Look:
    """Let the clients measure an adapter, or the base model, on the rows that they have now.

    Raises:
        FedLLMError: too few clients answer.
    """
    folder = run_folder(settings, LOOK)
    shutil.rmtree(folder, ignore_errors=True)
    put_start(folder, adapter)
    federate([*_words(settings, LOOK), "evaluation.every=only", "evaluation.prompts=", "track.to="])
    joined = {
        entry["client"]: entry for entry in read_entries(folder / DECISIONS) if entry["event"] == "joined"
    }
    num_rows = sum(entry["num_train"] + entry["num_held_out"] for entry in joined.values())
    return Look(gate_figures(folder).after, num_rows)


def retrain(federate: Federate, settings: Settings, name: str, adapter: Path | None) -> Path:
    """Do a run that starts from an adapter, or go on with it, and return its folder.

    Raises:
        FedLLMError: it cannot go on, or ended without an adapter.
    """
    folder = run_folder(settings, name)
    put_start(folder, adapter)
    federate([*_words(settings, name), "run.resume=true"])
    return folder


def run_folder(settings: Settings, name: str) -> Path:
    """Return the folder of a run of the pipeline."""
    return settings.path(settings.run.folder) / name


def put_start(folder: Path, adapter: Path | None) -> None:
    """Copy an adapter, with its signature, to where the run in `folder` starts from, unless it is there."""
    if adapter is None or (folder / START).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    copied = Path(tempfile.mkdtemp(prefix=f".{START}-", dir=folder))  # whole before it has its name
    shutil.copytree(adapter, copied, dirs_exist_ok=True)
    copied.rename(folder / START)


def _words(settings: Settings, name: str) -> list[str]:
    recipe, output = settings.path(settings.run.recipe), settings.path(settings.run.folder)
    return [str(recipe), f"run.name={name}", f"run.output={output}"]
