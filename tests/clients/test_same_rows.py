"""A node with a file of its own refuses to go on with rows that were edited."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clients.data_holder import DataHolder
from clients.process import Process
from clients.same_rows import refuse_edited


@pytest.fixture
def open_with(write_rows: Callable, make_config: Callable, tmp_path: Path) -> Callable[..., DataHolder]:
    """Return a function that opens a node as a new process does, on a file whose rows all say `text`."""

    def do(text: str, run_name: str = "run", **node: object) -> DataHolder:
        file = write_rows("own.jsonl", {"anna": 4}, secret=text)
        own = {"data-path": str(file), "client-id": "anna", "server-paths": True, "state-path": str(tmp_path)}
        return Process().open(make_config(**{"run.name": run_name}).to_flat(), {**own, **node})

    return do


def test_edited_rows_are_refused_until_they_are_restored(
    open_with: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    assert refuse_edited(open_with("one"), {"anna": 0}) == {}
    assert refuse_edited(open_with("two"), {"anna": 8})["anna"].code == "bad-data"
    assert "client anna: its rows were edited" in caplog.text
    assert "two" not in caplog.text
    assert refuse_edited(open_with("one"), {"anna": 8}) == {}


def test_a_run_that_begins_notes_its_rows_anew(open_with: Callable, tmp_path: Path) -> None:
    for text in ("one", "two"):
        assert refuse_edited(open_with(text), {"anna": 0}) == {}
    assert refuse_edited(open_with("two"), {"anna": 8}) == {}
    assert refuse_edited(open_with("three", run_name="other"), {"anna": 8}) == {}
    files = list(tmp_path.rglob("rows-*"))
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in files} == {0o700}
