"""`fedllm run` keeps how the rows are dealt, whatever becomes of the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.process import PROCESS
from fedllm.config.run_config import RunConfig
from fedllm.data.partition import load_partition
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import describe_run
from scripts import cli
from scripts.command_line import run_app
from scripts.commands import run_command
from scripts.console import Console
from scripts.run_view import RunView
from strategies import run as federation

VIEW = RunView(Console(quiet=True), resolve(RunConfig()))


class CrashError(Exception):
    """What ends a run in these tests before it has done anything."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """Return a function (number of rows, **flat) that starts a run on so many rows, and has it crash."""

    def crash(*unused: Any, **also_unused: Any) -> None:
        raise CrashError

    def do(num_rows: int, **flat: Any) -> RunConfig:
        source = tmp_path / f"{num_rows}.jsonl"
        rows = [{"prompt": f"q{row}", "response": "a"} for row in range(num_rows)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = tmp_path / "rows.jsonl"
        file.unlink(missing_ok=True)
        file.symlink_to(source)
        PROCESS.sources.clear()  # another process reads the source anew
        own = {"data.source": str(file), "data.partition": "iid", "federation.num-clients": 2}
        config = RunConfig.from_flat({**own, "run.output": str(tmp_path), **flat})
        with pytest.raises(CrashError):
            run_command.run_in("local", config, VIEW)
        return config

    monkeypatch.setattr(federation, "run_federation", crash)
    return do


def test_a_run_that_crashed_goes_on_only_with_the_same_rows(start: Callable) -> None:
    start(8)
    start(8, **{"run.resume": True})
    with pytest.raises(ConfigError, match="the rows are no longer those of"):
        start(6, **{"run.resume": True})


def test_run_begun_anew_keeps_its_new_rows(start: Callable, tmp_path: Path) -> None:
    start(8)
    config = start(6)
    assert load_partition(tmp_path / "run" / "partition.json") == PROCESS.read_source(config).partition


def test_an_earlier_run_keeps_its_own(start: Callable, tmp_path: Path) -> None:
    config = start(8)
    before = PROCESS.read_source(config).partition
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds an earlier run"):
        start(6)
    assert load_partition(tmp_path / "run" / "partition.json") == before


@pytest.mark.parametrize(("seed", "is_saved"), [(0, True), (1, False)])
def test_resume_without_a_partition_saves_its_own(
    seed: int, is_saved: bool, start: Callable, tmp_path: Path
) -> None:
    config = start(8, seed=0)
    describe_run(tmp_path / "run", config)
    (tmp_path / "run" / "partition.json").unlink()
    start(8, seed=seed, **{"run.resume": True})
    assert (tmp_path / "run" / "partition.json").exists() is is_saved


def test_an_unknown_command_gets_one_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(cli.app, ["rnu"], name="fedllm") == 2
    assert capsys.readouterr().err.count("Did you mean 'run'?") == 1
