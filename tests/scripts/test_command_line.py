"""The command of benchmarks and experiments: a module's options, and one line for what cannot be met."""

from pathlib import Path

import pytest

from scripts.command_line import run_module

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
