"""A tiny federation of four data holders, one of whom will leave."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.run_config import RunConfig

NAMES = ("anna", "ben", "cleo", "dora")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def make_config(tmp_path: Path, make_model_folder: Callable[..., Path]) -> Callable[..., RunConfig]:
    """Return a function (names of clients, **flat overrides) -> the configuration of a run of theirs."""

    def make(names: tuple[str, ...] = NAMES, overrides: dict[str, Any] | None = None) -> RunConfig:
        file = tmp_path / f"{'-'.join(names)}.jsonl"
        rows = [row for name in names for row in rows_of(name)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "run.name": "first",
            "run.output": str(tmp_path / "runs"),
            "model.name": str(make_model_folder()),
            "model.device": "cpu",
            "data.source": str(file),
            "data.held-out-fraction": 0.4,
            "lora.rank": 4,
            "lora.alpha": 8.0,
            "federation.num-clients": len(names),
            "federation.num-rounds": 2,
            "train.local-steps": 2,
            "train.batch-size": 4,
            "train.learning-rate": 0.02,
            "train.max-length": 32,
            "wire.codec": "fp32",
            "evaluation.max-new-tokens": 0,
        }
        return RunConfig.from_flat({**values, **(overrides or {})})

    return make


def rows_of(name: str) -> list[dict[str, str]]:
    """Return a client's rows, the same whoever else there is; they share nothing."""
    draw = random.Random(name)

    def words(number: int) -> str:
        return " ".join("".join(draw.choices(LETTERS, k=4)) for _ in range(number))

    return [{"instruction": words(1), "output": words(2), "client": name} for _ in range(10)]
