"""`fedllm log verify` of a run's log and of a site's."""

import json
from pathlib import Path

import pytest

from fedllm.adapters.folder import WEIGHTS
from fedllm.chained_log import append
from fedllm.runs.folder import write_rounds
from fedllm.runs.records import RoundRecord
from scripts.cli import app
from scripts.command_line import run_app


@pytest.fixture
def run_of(tmp_path: Path) -> Path:
    """A run folder with one round, a published adapter and their log."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "manifest.json").write_text(json.dumps({"sha256": {WEIGHTS: "aa"}}))
    write_rounds(tmp_path, [RoundRecord(round_num=1, adapter="bb")])
    log = tmp_path / "decisions.jsonl"
    append(log, {"event": "begun"}, {"event": "round", "round": 1, "adapter": "bb"})
    append(log, {"event": "published", "weights": "aa"})
    return tmp_path


def verified(*words: object) -> int:
    return run_app(app, ["log", "verify", *map(str, words)], name="fedllm")


def test_an_intact_log_is_counted(run_of: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(run_of, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"] == {"begun": 1, "round": 1, "published": 1}
    assert verified(run_of / "decisions.jsonl", "--head", found["digest"]) == 0
    assert "3 lines, none changed" in capsys.readouterr().out


def test_a_sites_log_is_found_in_its_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(tmp_path / "log.jsonl", {"question": "train"})
    assert verified(tmp_path) == 0
    assert "1 train" in capsys.readouterr().out


def test_a_changed_line_is_named_with_exit_code_1(run_of: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = run_of / "decisions.jsonl"
    log.write_text(log.read_text().replace('"bb"', '"cc"'))
    assert verified(run_of) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "decisions.jsonl: line 3 does not follow" in line
    assert verified(run_of, "--json") == 1
    assert json.loads(capsys.readouterr().out)["intact"] is False


def test_a_cut_log_is_found_by_a_noted_digest(run_of: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verified(run_of, "--json")
    head = json.loads(capsys.readouterr().out)["digest"]
    log = run_of / "decisions.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    assert verified(run_of) == 0
    assert verified(run_of, "--head", head) == 1


def test_rounds_and_weights_must_be_those_of_the_log(
    run_of: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rounds(run_of, [RoundRecord(round_num=1, adapter="other")])
    assert verified(run_of) == 1
    assert "round 1 is not the one in" in capsys.readouterr().err
    (run_of / "rounds.jsonl").unlink()
    (run_of / "adapter" / "manifest.json").write_text(json.dumps({"sha256": {WEIGHTS: "ab"}}))
    assert verified(run_of) == 1
    assert "not the weights" in capsys.readouterr().err


def test_no_log_is_one_line_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(tmp_path) == 2
    assert "neither a log nor a folder" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["adapter/manifest.json", "rounds.jsonl"])
def test_a_damaged_file_beside_the_log_is_named(
    damaged: str, run_of: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_of / damaged).write_text("{")
    assert verified(run_of) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert Path(damaged).name in line
