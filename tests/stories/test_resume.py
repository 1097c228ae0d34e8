"""A run that was killed continues as if it never had been."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from fedllm.runs.checkpoint import newest_round

FEDLLM = str(Path(sys.executable).with_name("fedllm"))


def _rounds(folder: Path) -> list[int]:
    file = folder / "rounds.jsonl"
    return [json.loads(line)["round"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_sigkill_in_a_round_then_resume_gives_the_same_bytes(tiny_run, fedllm, tmp_path):
    words, killed = [*tiny_run, "--out", str(tmp_path)], tmp_path / "killed"
    process = _started([*words, "run.name=killed", "federation.num-rounds=500"], tmp_path)
    _wait_for_round(1, killed, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "adapter").exists()

    rounds = _rounds(killed)[-1] + 2  # it got as far as this machine is fast
    words.append(f"federation.num-rounds={rounds}")
    fedllm("run", *words, "run.name=killed", "--resume")
    fedllm("run", *words, "run.name=whole")
    assert _rounds(killed) == list(range(rounds + 1))
    for name in ("adapter_model.safetensors", "fedllm.json"):
        assert (killed / "adapter" / name).read_bytes() == (
            tmp_path / "whole" / "adapter" / name
        ).read_bytes()
    fedllm("compare", str(tmp_path / "whole"), str(killed), "--assert-equal")


@pytest.mark.soak
@pytest.mark.slow
def test_ctrl_c_leaves_complete_rounds_and_one_line(tiny_run, fedllm, tmp_path):
    words = [*tiny_run, "federation.num-rounds=500", "--out", str(tmp_path), "run.name=stopped"]
    process = _started(words, tmp_path)
    _wait_for_round(1, tmp_path / "stopped", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    (line,) = error.strip().splitlines()
    number = newest_round(tmp_path / "stopped" / "checkpoints")
    assert line.startswith(f"fedllm: stopped; round {number} is saved; go on with: ")
    assert line.endswith("--resume")
    evaluated = fedllm("evaluate", str(tmp_path / "stopped"))
    assert f"the adapter of round {number}; to go on: fedllm run" in evaluated.stdout


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("sign", "runtime"), [(signal.SIGKILL, "simulation"), (signal.SIGTERM, "deployment")]
)
def test_all_processes_of_a_run_end_with_it(sign, runtime, tiny_run, tmp_path):
    words = [*tiny_run, "federation.num-clients=2", "federation.num-rounds=500"]
    process = _started([*words, "--out", str(tmp_path), "run.name=killed", "--runtime", runtime], tmp_path)
    while not (tmp_path / "killed" / "config.toml").exists():  # written once all clients have joined
        assert process.poll() is None, "the run ended before its time"
        time.sleep(0.02)
    assert len(_processes(tmp_path)) > 3
    process.send_signal(sign)
    _, error = process.communicate()
    assert process.returncode == (143 if sign == signal.SIGTERM else -sign)
    assert sign == signal.SIGKILL or error.startswith("fedllm: stopped; "), error
    ends = time.monotonic() + 600
    while living := _processes(tmp_path):
        assert time.monotonic() < ends, living
        time.sleep(0.1)


def _started(words, folder: Path) -> "subprocess.Popen[str]":
    """Start a run whose processes all have `folder` in their environment."""
    return subprocess.Popen(
        [FEDLLM, "run", *words],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "STORY": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs tests in the background has them ignore Ctrl-C, and so would this process
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for_round(number: int, folder: Path, process: "subprocess.Popen[str]") -> None:
    while number not in _rounds(folder):
        assert process.poll() is None, "the run ended before its time"
        time.sleep(0.02)


def _processes(folder: Path) -> list[str]:
    """Return the names of the living processes that were started for a story."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is a zombie
            if f"STORY={folder}".encode() in (place / "environ").read_bytes():
                found.append((place / "comm").read_text())
    return found
