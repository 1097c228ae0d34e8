"""A chained log: what is added stays, and what is changed is found."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.chained_log import append, read_entries, verify
from fedllm.errors import IntegrityError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Five entries, the second very long."""
    path = tmp_path / "log.jsonl"
    for number in range(5):
        append(path, {"number": number, "word": "é\x1b[2J" * (5000 if number == 1 else 1)})
    return path


def test_entries_come_back_in_order(log: Path) -> None:
    assert [entry["number"] for entry in read_entries(log)] == list(range(5))
    check = verify(log)
    assert (check.num_lines, check.num_torn) == (5, 0)
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.read_bytes().isascii()


def test_several_entries_are_as_good_as_one_each(tmp_path: Path) -> None:
    append(tmp_path / "log", {"a": 1}, {"a": 2})
    append(tmp_path / "log", {"a": 3})
    assert verify(tmp_path / "log").num_lines == 3


@pytest.mark.parametrize("line", range(4))
@pytest.mark.parametrize("change", ["flip", "remove", "swap", "repeat", "rubbish"])
def test_the_first_changed_line_is_named(log: Path, line: int, change: str) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    if change == "flip":
        lines[line] = lines[line].replace(b'"number": ', b'"number": 7')
    elif change == "remove":
        del lines[line]
    elif change == "swap":
        lines[line : line + 2] = reversed(lines[line : line + 2])
    elif change == "repeat":
        lines.insert(line, lines[line])
    else:
        lines[line] = b"[" * 100_000 + b"\n"
    log.write_bytes(b"".join(lines))
    # A changed value shows where the next line was chained to the old one.
    named = line + 1 + (change in {"flip", "repeat"})
    with pytest.raises(IntegrityError, match=rf"log\.jsonl: line {named} "):
        verify(log)


def test_a_noted_digest_shows_that_the_end_was_cut(log: Path) -> None:
    noted = verify(log).head
    append(log, {"number": 5})
    verify(log, noted)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:4]))
    assert verify(log).num_lines == 4  # the chain alone does not tell
    with pytest.raises(IntegrityError, match="cut from its end"):
        verify(log, noted)


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_no_damage_and_is_replaced(log: Path, cut: int) -> None:
    log.write_bytes(log.read_bytes()[:-cut])
    check = verify(log)
    assert check.num_lines == 4
    assert check.num_torn > 0
    append(log, {"number": "again"})
    assert [entry["number"] for entry in read_entries(log)] == [0, 1, 2, 3, "again"]
    assert verify(log).num_torn == 0


def test_a_torn_first_line_leaves_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b'{"time"')
    assert verify(tmp_path / "log").num_lines == 0
    append(tmp_path / "log", {"a": 1})
    assert verify(tmp_path / "log").num_lines == 1


def test_an_absent_log_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        verify(tmp_path / "none")


def test_the_fields_of_the_chain_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="own"):
        append(tmp_path / "log", {"previous": ""})


_ADDS = """
import sys
from pathlib import Path
from fedllm.chained_log import append
for number in range(40):
    append(Path(sys.argv[1]), {"writer": sys.argv[2], "number": number})
"""


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    writers = [subprocess.Popen([sys.executable, "-c", _ADDS, str(log), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert verify(log).num_lines == 80
    for name in "ab":
        assert [e["number"] for e in read_entries(log) if e["writer"] == name] == list(range(40))


def test_a_full_disk_leaves_the_log_as_it_was(log: Path) -> None:
    before = log.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
    try:
        with pytest.raises(OSError, match=re.escape(os.strerror(27))):
            append(log, {"number": 5, "word": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert log.read_bytes() == before
    assert json.loads(before.splitlines()[-1])["number"] == 4
