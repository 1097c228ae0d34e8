"""Whatever the encoding of the output, no character ends a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = "a · b … 서울 é"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "a | b ~ \\uc11c\\uc6b8 \\xe9"),
        ("latin-1", "a · b ~ \\uc11c\\uc6b8 é"),
        ("euc_kr", "a · b … 서울 \\xe9"),
        ("utf-8", WORDS),
    ],
)
def test_what_an_encoding_lacks_is_written_in_ascii(encoding: str, shown: str) -> None:
    code = "from scripts.terminal import make_output_plain as plain; import sys; plain();"
    code += f" print({WORDS!r}); print({WORDS!r}, file=sys.stderr)"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert [done.stdout.decode(encoding).strip(), done.stderr.decode(encoding).strip()] == [shown, shown]


def test_a_command_survives_an_ascii_terminal(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fedllm", "evaluate", "없는·폴더"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"\\uc5c6\\ub294|\\ud3f4\\ub354" in done.stderr
    assert b"Traceback" not in done.stderr
