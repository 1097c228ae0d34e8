"""Rows that were taken back: no run of the machine reads them, and the file does not tell what they said."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.forgotten import FORGOTTEN, forget_rows, without_forgotten
from clients.tokens import hosted_rows
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import ClientRows, Example
from fedllm.errors import CheckpointError


def text(*words: str) -> tuple[Example, ...]:
    return tuple(Example(text=word) for word in words)


def test_forgotten_rows_and_their_copies_are_read_no_more(tmp_path: Path) -> None:
    rows = ClientRows("ward", text("a", "b", "a", "c"), text("d", "b"))
    assert without_forgotten(rows, tmp_path) is rows
    assert forget_rows(tmp_path, text("a", "b")) == 2
    left = without_forgotten(rows, tmp_path)
    assert (left.train, left.held_out) == (text("c"), text("d"))
    assert forget_rows(tmp_path, text("d", "a")) == 3
    assert without_forgotten(rows, tmp_path).held_out == ()


def test_the_file_of_forgotten_rows_tells_nothing_without_its_salt(tmp_path: Path) -> None:
    for name in ("one", "two"):
        forget_rows(tmp_path / name, text("Anna has a cough."))
    files = [tmp_path / name / FORGOTTEN for name in ("one", "two")]
    contents = [json.loads(file.read_text()) for file in files]
    assert contents[0]["rows"] != contents[1]["rows"]
    assert "cough" not in files[0].read_text()
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "{}", '{"salt": "zz", "rows": []}', '{"salt": "00", "rows": null}'])
def test_a_damaged_file_of_forgotten_rows_stops_the_machine(content: str, tmp_path: Path) -> None:
    (tmp_path / FORGOTTEN).write_text(content)
    with pytest.raises(CheckpointError, match=r"forgotten\.json.* is damaged; restore it"):
        without_forgotten(ClientRows("ward", text("a"), ()), tmp_path)


@pytest.mark.parametrize("own_file", [True, False])
def test_a_node_hosts_no_forgotten_row(own_file: bool, tmp_path: Path, write_lines: Callable) -> None:
    file = write_lines(tmp_path / "rows.jsonl", ["one", "two", "three", "two"])
    forget_rows(tmp_path / "state", text("two"))
    config = RunConfig.from_flat(
        {"data.source": str(file), "data.partition": "iid", "federation.num-clients": 1}
    )
    node: dict[str, Any] = {"state-path": str(tmp_path / "state")}
    (rows,) = hosted_rows(config, {**node, "data-path": str(file)} if own_file else node)
    assert set(rows.train + rows.held_out) == set(text("one", "three"))


@pytest.fixture
def write_lines() -> Callable[[Path, list[str]], Path]:
    """Return a function that writes texts as rows of a file."""

    def write(path: Path, texts: list[str]) -> Path:
        path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
        return path

    return write
