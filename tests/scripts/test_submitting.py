"""What `flwr run` packs, and what a failed run says."""

import shutil
from pathlib import Path

from scripts.runtimes import submitting
from scripts.runtimes.processes import Link
from scripts.runtimes.submitting import app_folder, said_by_nodes


def test_app_of_a_checkout_is_the_checkout(tmp_path: Path):
    assert app_folder(Link(tmp_path, 1)) == submitting.ROOT


def test_app_of_a_wheel_holds_what_flower_packs(monkeypatch, tmp_path: Path):
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(submitting.ROOT / name, tmp_path)
    monkeypatch.setattr(submitting, "HERE", tmp_path)
    app_folder(Link(tmp_path, 1))
    (tmp_path / "app" / "fedllm" / "of_an_earlier_release.py").touch()
    app = app_folder(Link(tmp_path, 1))  # a run that is resumed is packed again
    assert {path.name for path in app.iterdir()} == {
        *("fedllm", "clients", "strategies", "pyproject.toml", "LICENSE")
    }
    packed = {path.relative_to(app) for path in app.rglob("*.py")}
    rooms = ("fedllm", "clients", "strategies")
    assert packed == {
        path.relative_to(submitting.ROOT) for room in rooms for path in (submitting.ROOT / room).rglob("*.py")
    }


def test_a_failed_run_ends_with_what_its_nodes_said():
    log = (
        "(ClientAppActor pid=1)\x1b[0m bad-data: rows.jsonl, line 3: no column text\x1b[0m\n"
        "ERROR: 0 usable clients joined; node 7: client reports bad-data (its rows cannot be read)\n"
        "bad-model: no such device\n"
    )
    assert said_by_nodes(log, "node 7: client reports bad-data (its rows cannot be read)") == [
        "rows.jsonl, line 3: no column text"
    ]
    assert said_by_nodes(log, "the disk is full") == []
