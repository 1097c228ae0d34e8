import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.answering import UNKNOWN
from clients.gate import Sender
from clients.process import Process
from fedllm.config.run_config import RunConfig
from tests.clients.hostile import NUM_ROWS, Hostile


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function (file name, client -> number of rows) -> a file of rows that name their client."""

    def write(name: str, counts: dict[str, int], secret: str = "") -> Path:
        lines = [
            {
                "instruction": f"{client} {row}? {secret}",
                "output": f"{secret} Return {row}.",
                "client": client,
            }
            for client, count in counts.items()
            for row in range(count)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def make_config(make_model_folder: Callable[..., Path]) -> Callable[..., RunConfig]:
    """Return a function (source, **flat overrides) -> the configuration of a run with a tiny model."""

    def make(source: Any = "docstrings", **flat: Any) -> RunConfig:
        values = {
            "model.name": str(make_model_folder()),
            "model.device": "cpu",
            "data.source": str(source),
            "federation.num-clients": 2,
            "lora.rank": 2,
            "lora.target-modules": "q_proj",
            "train.local-steps": 2,
            "train.batch-size": 2,
            "train.max-length": 64,
        }
        return RunConfig.from_flat({**values, **flat})

    return make


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that writes this machine's site.toml, whose state is its own."""
    file = tmp_path / "site.toml"
    monkeypatch.setenv("FEDLLM_SITE", str(file))

    def write(text: str) -> None:
        file.write_text(f'[site]\nstate-path = "state"\n{text}')

    write("")
    return write


@pytest.fixture
def hostile(
    site: Callable, write_rows: Callable, make_config: Callable, make_model_folder: Callable
) -> Callable[..., Hostile]:
    """Return a function (**keys of its run) -> a server that may ask a node of 40 rows."""
    file = write_rows("ward.jsonl", {"x": NUM_ROWS})
    node = {"data-path": str(file), "client-id": "ward", "model-path": str(make_model_folder())}
    process = Process()

    def make(sender: Sender = UNKNOWN, **keys: Any) -> Hostile:
        return Hostile(make_config(**keys), process, node, sender)

    return make
