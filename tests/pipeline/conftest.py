"""A pipeline whose runs need no model: what each adapter is worth on the clients' rows stands in a file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.chained_log import append
from fedllm.identity import new_key
from fedllm.registry.registry import Registry
from fedllm.runs.folder import DECISIONS, RESULT, START
from scripts.pipeline.settings import Settings, read_settings
from scripts.pipeline.state import PipelineState, read_state
from scripts.pipeline.steps import Pipeline, tick
from tests.builders import small_layout
from tests.registry.conftest import KEY, finished_run

CLIENTS = ("anna", "ben", "cem")


@dataclass(frozen=True)
class World:
    """What the clients have at one look: rows in all, and the loss of each adapter; 0 is the base model.

    An adapter is known by the number of the run that gave it.
    """

    losses: dict[int, float]
    num_rows: int = 100

    def of(self, adapter: int) -> dict[str, float]:
        """Return the held-out losses of all clients under an adapter."""
        return {name: self.losses[adapter] + 0.01 * place for place, name in enumerate(CLIENTS)}


@dataclass
class Town:
    """A pipeline in a folder, and the clients that its runs meet."""

    pipeline: Pipeline
    told: list[str]
    world: World

    def look(self, world: World) -> PipelineState:
        """Do one tick while the clients have this."""
        self.world = world
        return tick(self.pipeline)

    @property
    def in_use(self) -> int:
        """The version in use, 0 where there is none."""
        return self.pipeline.history().current.get("production", 0)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Return the entries of the registry's log of these events."""
        return [entry for entry in self.pipeline.registry.entries() if entry["event"] in names]

    def state(self) -> PipelineState:
        """Return what is on disk."""
        return read_state(self.pipeline.folder)

    def federate(self, words: Sequence[str]) -> None:
        """Do a look or a run: its adapter is the initial one of the seed that the run's name ends with."""
        keys = dict(word.split("=", 1) for word in words[1:])
        folder = Path(keys["run.output"]) / keys["run.name"]
        if (folder / RESULT).exists() and "held_out" in json.loads((folder / RESULT).read_text()):
            return  # complete: `finished_run` writes a result without losses first
        started = _number_of(folder / START) if (folder / START).exists() else 0
        only_looks = keys.get("evaluation.every") == "only"
        gives = started if only_looks else int(keys["run.name"].rpartition("-")[2])
        folder.mkdir(parents=True, exist_ok=True)
        for name in CLIENTS:
            rows = {"num_train": self.world.num_rows // 3, "num_held_out": 0}
            append(folder / DECISIONS, {"event": "joined", "client": name, **rows})
        if not only_looks:
            finished_run(folder, gives)
        ends = {"before": started, "after": gives}
        held_out = {name: {"clients": self.world.of(adapter)} for name, adapter in ends.items()}
        (folder / "result.json.new").write_text(json.dumps({"status": "completed", "held_out": held_out}))
        (folder / "result.json.new").rename(folder / RESULT)


def _number_of(start: Path) -> int:
    digest = load_adapter(start).state.digest
    return next(seed for seed in range(10) if initial_adapter(small_layout(), seed).digest == digest)


def settings_in(folder: Path, tables: str = "") -> Settings:
    """Return the settings of a pipeline in `folder`, with further tables in TOML."""
    (folder / "recipe.toml").write_text("seed = 0\n")
    if not (folder / "key").exists():
        new_key(folder / "key")
    file = folder / "pipeline.toml"
    file.write_text(f'[run]\nrecipe = "recipe.toml"\n[registry]\nfolder = "clinic"\nkey = "key"\n{tables}')
    return read_settings(file)


@pytest.fixture
def make_town(tmp_path: Path) -> Callable[..., Town]:
    """Return a function (tables in TOML, folder) -> a town."""

    def make(tables: str = "[trigger]\nnew-rows = 50\n", folder: Path = tmp_path) -> Town:
        settings, told = settings_in(folder, tables), list[str]()
        registry = Registry(settings.path(settings.registry.folder))
        town = Town(
            Pipeline(settings, registry, KEY, lambda words: None, lambda run: None, lambda: 0.0, told.append),
            told,
            World({}),
        )
        town.pipeline = replace(town.pipeline, federate=town.federate)
        return town

    return make
