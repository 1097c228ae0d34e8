"""A run that was killed continues as if it never had been."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

FEDLLM = str(Path(sys.executable).with_name("fedllm"))


def _rounds(folder: Path) -> list[int]:
    file = folder / "rounds.jsonl"
    return [json.loads(line)["round"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_sigkill_in_a_round_then_resume_gives_the_same_bytes(tiny_run, fedllm, tmp_path):
    words = [*tiny_run, "federation.num-rounds=3", "train.local-steps=60", "--out", str(tmp_path)]
    fedllm("run", *words, "run.name=whole")
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [FEDLLM, "run", *words, "run.name=killed"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ends = time.monotonic() + 600
    while 1 not in _rounds(killed) and time.monotonic() < ends and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)  # into round 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    assert _rounds(killed) in ([0, 1], [0, 1, 2])  # as fast as this machine is
    assert not (killed / "adapter").exists()

    refused = fedllm("run", *words, "run.name=killed", check=False)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr

    fedllm("run", *words, "run.name=killed", "--resume")
    assert _rounds(killed) == [0, 1, 2, 3]
    for name in ("adapter_model.safetensors", "fedllm.json"):
        assert (killed / "adapter" / name).read_bytes() == (
            tmp_path / "whole" / "adapter" / name
        ).read_bytes()
    fedllm("compare", str(tmp_path / "whole"), str(killed), "--assert-equal")


@pytest.mark.slow
def test_interrupt_leaves_complete_rounds_and_one_line(tiny_run, tmp_path):
    process = subprocess.Popen(
        [FEDLLM, "run", *tiny_run, "train.local-steps=200", "--out", str(tmp_path), "run.name=stopped"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs tests in the background has them ignore Ctrl-C, and so would this process
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    ends = time.monotonic() + 600
    while 1 not in _rounds(tmp_path / "stopped") and time.monotonic() < ends and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1].startswith("fedllm: stopped")
    assert "Traceback" not in error
    assert (tmp_path / "stopped" / "checkpoints" / "round-00001" / "manifest.json").exists()
