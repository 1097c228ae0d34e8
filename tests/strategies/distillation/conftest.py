"""A federation of four clients who learn to answer in four ways, so that they have something to teach."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from clients.client_app import app
from fedllm.config.run_config import RunConfig
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from scripts.runtimes.local import local_grid
from strategies.distillation.teachers import Teachers
from strategies.rounds import next_round
from strategies.run import run_federation
from strategies.session import Watch
from tests.strategies.distillation.builders import CHEAP, NAMES, with_keys, write_rows


@pytest.fixture(scope="module")
def model_folder(make_model_folder: Callable, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a tiny model that can be sure of something: with small embeddings its laws are nearly even."""
    folder = tmp_path_factory.mktemp("sure")
    shutil.copytree(make_model_folder(), folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data *= 12
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_config(make_config: Callable, model_folder: str, private_file: str) -> Callable[..., RunConfig]:
    """Return a function (flat overrides) -> the tiny federation on that model, trained so that it learns."""

    def make(overrides: dict[str, Any] | None = None) -> RunConfig:
        learning = {
            "model.name": model_folder,
            "data.source": private_file,
            "lora.rank": 4,
            "lora.target-modules": "all-linear",
            "train.local-steps": 20,
            "train.learning-rate": 0.02,
        }
        config: RunConfig = make_config({**learning, **(overrides or {})})
        return config

    return make


@pytest.fixture(scope="module")
def private_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("private") / "private.jsonl", 24, 0)


@pytest.fixture(scope="module")
def public_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write public rows of the clients' four kinds, which no client has."""
    return write_rows(tmp_path_factory.mktemp("public") / "public.jsonl", 12, 24)


@pytest.fixture
def run(make_config: Callable, tmp_path: Path) -> Callable[..., tuple[ServerState, list[str]]]:
    """Return a function (name, hook on every record, **flat overrides) that does a run of two rounds."""

    def do(name: str, hook: Callable[[RoundRecord], None] = lambda record: None, **flat: Any) -> Any:
        notices: list[str] = []
        fixed = {"run.output": str(tmp_path), "run.name": name, "federation.num-rounds": 2}
        config = make_config({**fixed, "train.token-budget": 1, **flat})
        watch = Watch(notice=notices.append, record=hook)
        return run_federation(config, local_grid(config, app, num_nodes=2), watch), notices

    return do


@pytest.fixture
def trained(make_config: Callable, open_run: Callable) -> Callable[..., Any]:
    """Return a function (**flat) -> a session, the states around its first round, the clients' adapters."""

    def do(**flat: Any) -> Any:
        opened = open_run(make_config({**CHEAP, **flat, "distill.when": "never"}))
        teachers = Teachers(opened.state.adapter, 1, 8)
        original = opened.session.watch
        session = replace(
            opened.session, watch=replace(original, client=lambda number, update: teachers.add(update))
        )
        after, record = next_round(session, opened.state)
        assert record.accepted == NAMES
        return with_keys(session), opened.state, after, teachers.without(())

    return do
