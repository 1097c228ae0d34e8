"""`fedllm adapt`: what a run did at home, done again at any time, and with rows that were in no run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.adapters.folder import load_adapter
from scripts import cli

ROWS = 24


def fedllm(*words: str) -> int:
    return cli.run_app(cli.app, list(words), name="fedllm")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two clients."""
    file = tmp_path_factory.mktemp("rows") / "own.jsonl"
    texts = [{"prompt": f"Row {n}?", "response": f"It is {n}", "client": "ab"[n % 2]} for n in range(ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return file


@pytest.fixture(scope="module")
def run(make_model_folder: Callable[..., Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose two clients have trained on at home."""
    out = tmp_path_factory.mktemp("runs")
    keys = {
        "model.name": make_model_folder(),
        "data.source": rows,
        "federation.num-clients": 2,
        "federation.num-rounds": 1,
        "data.held-out-fraction": 0.3,
        "personal.mode": "finetune",
        "personal.steps": 8,
        "train.learning-rate": 0.01,
        "run.name": "made",
    }
    assert fedllm("run", *(f"{key}={value}" for key, value in keys.items()), "--out", str(out)) == 0
    return out / "made"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert fedllm(*words, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_adapting_a_run_repeats_what_its_clients_did(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads((run / "result.json").read_text())["at_home"]
    found = printed(capsys, "adapt", str(run), "--steps", "8")
    for name, one in told["clients"].items():
        assert found["clients"][name] == pytest.approx(one)
        kept = next((run / "private").glob(f"*/{name}/home"))
        adapted = Path(found["folders"][name])
        assert adapted == run / "private" / "adapted" / name
        assert adapted.stat().st_mode & 0o777 == 0o700
        assert load_adapter(adapted).state.vector.allclose(load_adapter(kept).state.vector, atol=1e-6)
    for target in (run, run / "adapter"):  # nothing private goes into what is published
        assert fedllm("adapt", str(target)) == 2
        assert "adapted: holds something already; name a new one" in capsys.readouterr().err


def test_a_matrix_has_the_adapters_of_home(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = printed(capsys, "evaluate", str(run), "--matrix")["matrix"]["losses"]
    assert list(losses["a"]) == ["base", "made", "own:a", "own:b"]


def test_rows_of_ones_own_adapt_a_published_adapter(
    run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / ".other-abcd1234"  # as what another process is writing there
    other.mkdir()
    assert (
        fedllm("adapt", str(run), "--data", str(rows), "--out", str(tmp_path / "mine"), "--steps", "4") == 0
    )
    shown = capsys.readouterr().out
    assert "what joining brought:" in shown
    assert "not to be published" in shown
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "do not publish it" in card
    assert load_adapter(tmp_path / "mine").state.layout == load_adapter(run / "adapter").state.layout
    assert other.is_dir()


def test_too_few_rows_and_none_are_refused(
    run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(rows.read_text().splitlines()[:3]))
    out = ("--out", str(tmp_path / "none"))
    assert fedllm("adapt", str(run), "--data", str(few), *out) == 2
    assert "nobody has a row to train on and two different ones held out" in capsys.readouterr().err
    assert fedllm("adapt", str(run), "--learning-rate", "0", *out) == 2
    assert "learning-rate = 0" in capsys.readouterr().err
    (run / "adapter").rename(tmp_path / "alone")
    assert fedllm("adapt", str(tmp_path / "alone"), *out) == 2
    assert "needs rows: give some with --data" in capsys.readouterr().err
    (tmp_path / "alone").rename(run / "adapter")
