"""`fedllm run` keeps how the rows are dealt, and says how a run that was stopped goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.process import PROCESS
from fedllm.data.partition import load_partition
from fedllm.errors import ConfigError
from scripts import cli
from scripts.answers import Answers
from scripts.command_line import StoppedError, run_app
from scripts.commands import run_command
from strategies import run as federation


class CrashError(Exception):
    """What ends a run in these tests before it has done anything."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that starts a run on so many rows of one answer, and has it end by an exception."""

    def do(
        num_rows: int,
        *,
        resume: bool = False,
        answer: str = "a",
        by: type[BaseException] | None = CrashError,
        more: tuple[str, ...] = (),
    ) -> str:
        def end(*unused: Any, **also_unused: Any) -> None:
            raise by or AssertionError("a finished run was done again")

        monkeypatch.setattr(federation, "run_federation", end)
        file = tmp_path / "rows.jsonl"
        rows = [{"prompt": f"q{row}", "response": answer} for row in range(num_rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        PROCESS.sources.clear()  # another process reads the source anew
        words = [f"data.source={file}", "data.partition=iid", "federation.num-clients=2"]
        options = {"runtime": "local", "out": tmp_path, "on_bad_row": "", "as_json": True}
        try:
            run_command.run([*words, *more], resume=resume, **options)
        except (CrashError, StoppedError) as error:
            return str(error)
        assert by is None, "the run did not begin"
        return ""

    return do


def saved_round(tmp_path: Path) -> None:
    """Leave a complete round, which says nothing of the run's keys."""
    (tmp_path / "run" / "checkpoints" / "round-00001").mkdir(parents=True)


def owners(tmp_path: Path) -> Any:
    return load_partition(tmp_path / "run" / "partition.json")


def test_a_run_with_a_round_goes_on_only_with_the_same_rows(start: Callable, tmp_path: Path) -> None:
    start(8)
    saved_round(tmp_path)
    start(8, resume=True)
    before = owners(tmp_path)
    for changes in ({"num_rows": 6}, {"num_rows": 8, "answer": "b"}):
        with pytest.raises(ConfigError, match="rows of client-0000"):
            start(**changes, resume=True)
    assert owners(tmp_path) == before


def test_a_run_without_a_round_begins_with_the_rows_there_are(start: Callable, tmp_path: Path) -> None:
    start(8)
    start(6, resume=True)
    assert sum(map(len, owners(tmp_path).indices)) == 6


def test_an_earlier_run_keeps_its_own(start: Callable, tmp_path: Path) -> None:
    start(8)
    before = owners(tmp_path)
    saved_round(tmp_path)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        start(6)
    assert owners(tmp_path) == before


def test_resume_without_a_partition_saves_its_own(start: Callable, tmp_path: Path) -> None:
    start(8)
    saved_round(tmp_path)
    (tmp_path / "run" / "partition.json").unlink()
    start(8, resume=True)
    assert sum(map(len, owners(tmp_path).indices)) == 8


@pytest.mark.parametrize(
    ("has_round", "says"), [(False, "no round was complete"), (True, "round 1 is saved")]
)
def test_a_stopped_run_says_what_is_saved(
    has_round: bool, says: str, start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fedllm", "run", "a name", "--resume"])
    start(8)
    if has_round:
        saved_round(tmp_path)
    line = start(8, resume=True, by=KeyboardInterrupt)
    assert says in line
    assert line.endswith("run 'a name' --resume")


def test_a_finished_run_is_shown_and_not_done_again(
    start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(8)
    saved_round(tmp_path)
    (tmp_path / "run" / "adapter").mkdir()
    result = {"status": "completed", "rounds": 3, "held_out": {}, "adapter": "here"}
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(run_command, "compare_answers", lambda *unused: Answers([], [], []))
    start(8, resume=True, by=None)
    assert json.loads(capsys.readouterr().out)["rounds"] == 3
    start(8, resume=True, more=("federation.num-rounds=4",))


def test_an_unknown_command_gets_one_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(cli.app, ["rnu"], name="fedllm") == 2
    assert capsys.readouterr().err.count("Did you mean 'run'?") == 1
