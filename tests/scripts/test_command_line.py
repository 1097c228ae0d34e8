"""The command of benchmarks and experiments: a module's options, and one line for what cannot be met."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from scripts.command_line import run_app, run_module

BENCHMARKS = {"fused": "one", "wire": "another"}
pytestmark = pytest.mark.research


def test_command_of_a_benchmark_takes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module("scripts.benchmarks", BENCHMARKS, ["wire", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(option in told for option in ("--quick", "--json", "--steps", "--plot"))


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module("scripts.benchmarks", BENCHMARKS, ["speed"]) == 2
    assert "speed" in capsys.readouterr().err


def test_option_that_cannot_be_met_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["wire", "--quick", "--model", str(tmp_path / "nowhere")]
    assert run_module("scripts.benchmarks", BENCHMARKS, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedllm: ")
    assert "nowhere" in line


@pytest.fixture
def hang_up() -> Iterator[None]:
    """Keep what this process does at SIGHUP and SIGINT; a shell has what runs behind it ignore the latter."""
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for sign, handler in before.items():
        signal.signal(sign, handler)


def signalled(sign: int) -> int:
    """Return the exit code of a command that gets a signal, 0 where it goes on."""
    app = typer.Typer()
    app.command()(lambda: os.kill(os.getpid(), sign))
    return run_app(app, [], name="fedllm")


@pytest.mark.parametrize(("sign", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_command_with_its_own_code(sign: str, code: int, hang_up: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signalled(signal.Signals[sign]) == code


def test_a_command_under_nohup_outlives_its_terminal(hang_up: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signalled(signal.SIGHUP) == 0


def test_a_command_to_go_on_with_names_the_module_that_was_started(tmp_path: Path) -> None:
    (tmp_path / "tried").mkdir()
    (tmp_path / "tried" / "__main__.py").write_text("from scripts.command_line import again\nprint(again())")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    told = subprocess.run(
        [sys.executable, "-m", "tried", "joining", "--quick"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "python -m tried joining --quick\n"
