"""`fedllm study`: cells are kept, a stopped study goes on, and what cannot be is refused in one line."""

import json
import sys
from pathlib import Path

import pytest

from fedllm.files import locked
from scripts import cli
from scripts.command_line import StoppedError
from scripts.recipe_arguments import config_of
from scripts.studies.cells import Study
from scripts.studies.doing import do_in

FEW = ("--methods", "base,alone,home", "--seeds", "2", "--rates", "0.03", "--jobs", "1")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedllm", "study", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_study_prints_and_keeps_what_joining_brought(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    assert run(monkeypatch, str(tiny_recipe), *FEW, "--out", str(folder)) == 0
    told = capsys.readouterr().out
    assert "6 cells of up to" in told
    assert "clients a lower loss than training alone" in told
    kept = json.loads((folder / "study.json").read_text())
    assert [(cell["method"], cell["seed"]) for cell in kept["cells"]] == [
        (method, seed) for seed in (0, 1) for method in ("base", "alone", "home")
    ]
    assert run(monkeypatch, str(tiny_recipe), *FEW, "--out", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out) == kept  # no cell was done again
    assert len((folder / "cells.jsonl").read_text().splitlines()) == 6


def test_a_stopped_study_goes_on_where_it_was(tiny_recipe: Path, tmp_path: Path) -> None:
    study = Study("s", config_of([str(tiny_recipe)]), ("base", "alone"), (0.03,), (0,))

    def stop(line: str) -> None:
        if line.startswith("1/2"):
            raise KeyboardInterrupt

    with pytest.raises(StoppedError, match="1 finished cells are kept"):
        do_in(tmp_path, study, 1, stop)
    told: list[str] = []
    do_in(tmp_path, study, 1, told.append)
    assert [line[:3] for line in told[1:]] == ["1 o", "1/1"]
    assert "2 cells" in told[0]
    assert "1 of them done already, 1 at once, about" in told[0]
    told.clear()
    do_in(tmp_path, study, 1, told.append)
    assert told[0].endswith("2 of them done already")  # no time is promised where nothing is left


def test_two_studies_never_share_a_folder(tiny_recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    study = Study("s", config_of([str(tiny_recipe)]), ("base",), (0.03,), (0,))
    with locked(tmp_path / ".study.lock"), pytest.raises(Exception, match="another process"):
        do_in(tmp_path, study, 1, lambda line: None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rates", "fast"), "--rates fast: expected positive numbers"),
        (("--methods", "alone,centralized"), "--methods centralized: expected some of"),
        (("data.held-out-fraction=0",), "raise data.held-out-fraction"),
    ],
)
def test_what_cannot_be_studied_is_one_line(
    words: tuple[str, ...],
    told: str,
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, str(tiny_recipe), *words, "--out", str(tmp_path / "study")) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
