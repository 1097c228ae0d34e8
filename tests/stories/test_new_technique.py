"""The example of CONTRIBUTING.md: one file on each side and the lines it shows are a whole new technique."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "sparsification"


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """Return a copy of the project with the example in it."""
    copy = tmp_path_factory.mktemp("with-example")
    for room in ("fedllm", "clients", "strategies", "scripts"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE / "client.py", copy / "clients" / "sparsification.py")
    shutil.copy(EXAMPLE / "server.py", copy / "strategies" / "sparsification.py")
    (patch,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    command = ["git", "apply", "--unidiff-zero", "-"]
    subprocess.run(command, cwd=copy, input=patch, text=True, check=True)
    return copy


def _run(copied: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copied), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedllm", "run", *words]
    return subprocess.run(
        command, cwd=copied, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_a_sparse_change_travels_and_the_rest_is_kept(copied, tiny_run, tmp_path):
    done = _run(copied, *tiny_run, "train.sent-share=0.1", "run.name=sparse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.strip() for line in done.stdout.splitlines() if "travelled" in line] == [
        f"round {number}: 10.0% of each change travelled" for number in (1, 2)
    ]
    kept = [load_file(file) for file in (tmp_path / "sparse" / "private").rglob("*.safetensors")]
    assert len(kept) == 4 * 2, "a state for each client and round"
    assert all(vectors["left-out"].count_nonzero() > 0 for vectors in kept)


@pytest.mark.slow
def test_it_is_refused_where_noise_must_hide_everything(copied, tiny_run, tmp_path):
    words = ["train.sent-share=0.1", "privacy.epsilon=8", "run.name=private", "--out", str(tmp_path)]
    done = _run(copied, *tiny_run, *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "privacy.epsilon" in line
    assert "train.sent-share" in line
