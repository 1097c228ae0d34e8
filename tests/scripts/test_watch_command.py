"""`fedllm watch`: what a run in another process writes is shown as it comes, and how it ended."""

import fcntl
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rich.console
import typer

from clients.client_app import app
from fedllm.chained_log import append
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.files import is_locked, locked
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import DECISIONS, ROUNDS, WRITER, describe_run, write_result, write_rounds
from fedllm.runs.records import RoundRecord
from scripts.command_line import StoppedError
from scripts.commands import watch_command
from scripts.console import Console
from scripts.followed_run import FollowedRun
from scripts.run_view import RunView
from scripts.runtimes.local import local_grid
from strategies.run import run_federation
from strategies.session import Watch

CONFIG = RunConfig.from_flat({"run.name": "seen", "federation.num-rounds": 2, "federation.num-clients": 3})


class Steps:
    """A clock on which every pause does the next step of a story; after the last, nothing."""

    def __init__(self, *steps: Callable[[], object]):
        self._steps: Iterator[Callable[[], object]] = iter(steps)

    def sleep(self, seconds: float) -> None:
        next(self._steps, lambda: None)()


def record(number: int) -> RoundRecord:
    return RoundRecord(round_num=number, held_out={"a": 3.0 - number})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run that has its configuration."""
    run = tmp_path / "seen"
    run.mkdir()
    describe_run(run, CONFIG)
    return run


@pytest.fixture
def printed() -> tuple[Console, io.StringIO]:
    """Return a console without a terminal, and what it prints."""
    console, text = Console(), io.StringIO()
    console.rich = rich.console.Console(file=text, width=200, highlight=False, markup=False)
    return console, text


def test_a_run_is_shown_until_its_lock_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    log = folder / DECISIONS
    write_rounds(folder, [record(0)])
    append(log, {"event": "notice", "text": "of before"}, {"event": "round", "round": 0})
    lost = {"event": "refused", "round": 1, "client": "ben", "code": "timeout", "reason": "no reply"}
    file = (folder / WRITER).open("a")
    fcntl.flock(file, fcntl.LOCK_EX)
    steps = Steps(
        lambda: append(log, {"event": "notice", "text": "one more joined"}, lost),
        lambda: write_rounds(folder, [record(0), record(1)]),
        lambda: write_result(folder, {"status": "failed", "reason": "all is lost"}),
        file.close,
    )
    monkeypatch.setattr(watch_command, "time", steps)
    with pytest.raises(typer.Exit) as ended:
        watch_command.watch(folder, as_json=False)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert ended.value.exit_code == 1
    assert lines[1:3] == ["one more joined", "round 1: client ben lost: no reply"]
    assert [line.split(" · ")[:2] for line in (lines[0], lines[3])] == [
        ["round 0/2", "held-out 3.000"],
        ["round 1/2", "held-out 2.000"],
    ]
    assert lines[4:] == ["failed: all is lost"]


def test_a_run_that_nobody_does_says_how_it_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(watch_command, "time", Steps())
    (folder / WRITER).touch()
    with pytest.raises(typer.Exit):
        watch_command.watch(folder, as_json=False)
    assert "interrupted: nobody does it any more; to go on: fedllm run" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        watch_command.watch(folder, as_json=True)
    assert json.loads(capsys.readouterr().out)["status"] == "interrupted"


def test_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder; name one, such as runs/run"):
        watch_command.watch(tmp_path, as_json=False)


@pytest.mark.parametrize("name", [ROUNDS, DECISIONS])
@pytest.mark.parametrize("line", ["{torn", "[1]", '{"event": "refused"}'])
def test_a_damaged_file_is_named(folder: Path, name: str, line: str) -> None:
    (folder / WRITER).touch()
    (folder / name).write_text(line + "\n")
    with pytest.raises(ConfigError, match=re.escape(str(folder / name))):
        watch_command.watch(folder, as_json=False)


def test_ctrl_c_ends_the_watching_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch_command, "time", Steps(interrupt))
    with locked(folder / WRITER), pytest.raises(StoppedError, match="the run goes on"):
        watch_command.watch(folder, as_json=False)


def test_a_look_keeps_nobody_from_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    with locked(path) as is_free:
        assert is_free
        assert is_locked(path)
        with locked(path) as is_free:
            assert not is_free
    assert not is_locked(path)


def test_a_real_run_is_followed_answer_by_answer(
    make_model_folder: Callable[..., Path], tmp_path: Path, printed: tuple[Console, io.StringIO]
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"q{n}", "response": "a b", "client": "abc"[n % 3]} for n in range(18)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"run.output": str(tmp_path), "model.name": str(make_model_folder()), "data.source": str(rows)}
    small = {"train.local-steps": 1, "train.max-length": 32, "lora.rank": 2, "model.device": "cpu"}
    config = CONFIG.override({**own, **small})
    (tmp_path / "seen").mkdir()
    console, text = printed
    view = RunView(console, resolve(config))
    followed = FollowedRun(tmp_path / "seen", view)
    answered: list[tuple[str, int]] = []

    def look(*heard: object) -> None:
        followed.look()
        answered.append((view.name, view.done))

    run_federation(config, local_grid(config, app), Watch(client=look, record=look))
    followed.look()
    # The base model is measured first; then three clients answer in each of two rounds.
    counted = [("training", 1), ("training", 2), ("training", 3), ("", 0)]
    assert answered == [("", 0), *counted, *counted]
    shown = [line.split(" · ")[0].strip() for line in text.getvalue().splitlines()]
    assert [line for line in shown if line.startswith("round ")] == ["round 0/2", "round 1/2", "round 2/2"]
