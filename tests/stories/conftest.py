"""Whole runs in real processes, with a tiny model and text made here."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

FEDLLM = str(Path(sys.executable).with_name("fedllm"))
VERBS = ("Return", "Open", "Sort", "Raise", "Convert", "Read", "Count", "Close")
NOUNS = ("the list", "a file", "two numbers", "the string", "an error", "the value")
# The originality of texts is asked about in a message of its own.
DISTILLED = ("distill.when=last", "distill.num-texts=8", "distill.steps=2", "distill.max-tokens=48")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Forty-eight rows of four owners."""
    file = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [
        {
            "prompt": f"def f{verb.lower()}({noun[-4:]})",
            "response": f"{verb} {noun}.",
            "owner": f"owner{i % 4}",
        }
        for i, (verb, noun) in enumerate((verb, noun) for verb in VERBS for noun in NOUNS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def tiny_run(make_model_folder, text_file):
    """Return the words of a run with a tiny model: four owners, two rounds, one thread."""
    return [
        "quickstart.toml",
        f"model.name={make_model_folder()}",
        f"data.source={text_file}",
        "data.partition=column:owner",
        "federation.num-clients=4",
        "federation.num-rounds=2",
        "federation.join-deadline=300",
        "model.num-threads=1",
        "model.device=cpu",
        "lora.rank=4",
        "train.local-steps=2",
        "train.token-budget=1",  # bit-equality wants every client in a pass of its own
        "evaluation.prompts=",
        "distill.when=never",  # a run with the step has stories of its own
    ]


@pytest.fixture
def fedllm(tmp_path):
    """Return a function that runs the command in a process of its own and returns what it printed."""

    def run(*words: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [FEDLLM, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def result_of(folder: Path) -> dict:
    """Return what a run's result.json says."""
    return json.loads((folder / "result.json").read_text())


def rounds_of(folder: Path) -> list[int]:
    """Return the rounds that a run has recorded."""
    file = folder / "rounds.jsonl"
    return [json.loads(line)["round"] for line in file.read_text().splitlines()] if file.exists() else []


def processes_of(story: Path, program: str = "") -> dict[int, str]:
    """Return the command lines of the living processes that were told of a folder, by id.

    The folder is in their environment or on their command line. With `program` only those that run it, and
    not their guard.
    """
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is a zombie
            told = (place / "cmdline").read_bytes()
            words = told.decode().split("\0")[:5]
            is_wanted = any(word.endswith(program) for word in words) and "guard.py" not in "".join(words)
            if str(story).encode() in told + (place / "environ").read_bytes() and is_wanted:
                found[int(place.name)] = told.decode().replace("\0", " ")
    return found


def wait_until(holds: Callable[[], bool], seconds: float = 600) -> None:
    """Wait until something holds."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.05)
