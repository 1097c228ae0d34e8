"""A recipe that a study does in a second: the suite's tiny model and a few rows of three clients."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = ("sum", "list", "file", "value", "error", "string", "number", "line", "index", "key", "name", "order")

TINY = {
    "run": {"name": "tiny"},
    "model": {"device": "cpu"},
    "lora": {"rank": 2, "alpha": 4.0, "target-modules": "q_proj,v_proj"},
    "data": {"partition": "column:client", "held-out-fraction": 0.25},
    "federation": {"num-clients": 3, "num-rounds": 2},
    "train": {"local-steps": 2, "batch-size": 2, "max-length": 64, "learning-rate": 0.01},
}


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, make_model_folder: Callable[..., Path]) -> Path:
    """Return a recipe of three clients of 16 rows, each with words in an order of its own."""
    folder = tmp_path_factory.mktemp("recipe")
    rows = [
        {
            "prompt": f"{client} {number}?",
            "response": f"Return the {WORDS[number % 12]} of a {WORDS[(5 * number + place + 1) % 12]}.",
            "client": client,
        }
        for place, client in enumerate(("code", "math", "news"))
        for number in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {**TINY, "model": {"name": str(make_model_folder()), **TINY["model"]}}
    tables["data"] = {"source": str(folder / "rows.jsonl"), **TINY["data"]}
    lines = []
    for table, keys in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines) + "\n")
    return path
