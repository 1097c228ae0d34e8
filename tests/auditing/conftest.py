"""Finished runs of two tiny data holders, made once for all tests of the audit."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.canaries import canary_file
from clients.client_app import app
from fedllm.config.run_config import RunConfig
from fedllm.runs.folder import run_folder
from scripts.runtimes.local import local_grid
from strategies.run import run_federation

CLIENTS = ("anna", "ben")
NUM_ROWS = 24  # of a client
SECRET = bytes(range(32))
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="session")
def random_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows that share nothing, so that what is known of one says nothing of another."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"

    def words(number: int) -> str:
        return " ".join("".join(draw.choices(LETTERS, k=4)) for _ in range(number))

    lines = [
        {"instruction": words(2), "output": words(4), "client": name}
        for name in CLIENTS
        for _ in range(NUM_ROWS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def finished(
    random_rows: Path, make_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a function (name, **flat overrides) -> the folder of a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    done: dict[str, Path] = {}

    def make(name: str, overrides: dict[str, Any] | None = None) -> Path:
        if name not in done:
            values = {
                "run.name": name,
                "run.output": str(runs),
                "model.name": str(make_model_folder()),
                "model.device": "cpu",
                "data.source": str(random_rows),
                "data.held-out-fraction": 0.5,
                "federation.num-clients": 2,
                "federation.num-rounds": 2,
                "lora.rank": 4,
                "lora.alpha": 8.0,
                "train.local-steps": 2,
                "train.batch-size": 2,
                "train.learning-rate": 0.01,
                "train.max-length": 64,
                "evaluation.prompts": "",
            }
            config = RunConfig.from_flat({**values, **(overrides or {})})
            secret = canary_file(run_folder(config) / "private", name)
            if config.audit.canaries:  # a known one: a test that tosses coins fails now and then
                secret.parent.mkdir(parents=True)
                secret.write_bytes(SECRET)
            run_federation(config, local_grid(config, app))
            done[name] = run_folder(config)
        return done[name]

    return make
