"""A log that is only ever added to: JSON lines, each with the SHA-256 of the line before it.

Whoever changes, removes or inserts a line breaks the chain at that place, unless they write all that follows
anew. Against that, and against lines cut from the end, note the digest of the last line somewhere else from
time to time: `verify` finds it again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from fedllm.errors import IntegrityError

TIME, PREVIOUS = "time", "previous"  # what a line has besides its entry
_START = "0" * 64  # before the first line
_TAIL_BYTES = 4096  # read from the end at first, to find the last line


@dataclass(frozen=True)
class LogCheck:
    """What an intact log holds: its lines, the digest of the last, and bytes of a line never finished."""

    num_lines: int
    head: str
    num_torn: int = 0


def append(path: Path, *entries: Mapping[str, Any], is_flushed: bool = True) -> str:
    """Add entries in one step, and return the digest of the last line; by then they are on disk.

    An absent log is made, for this user only.

    Several threads and processes may add to one log. What a crash left of an unfinished line is removed
    first: its `append` never returned, so nothing that hangs on it has happened. Without `is_flushed` they
    outlive this process at once, but a power cut only after the next call.

    Raises:
        OSError: the log cannot be written; it is then as before.
        ValueError: an entry is not JSON, or has a field `time` or `previous`.
    """
    is_new = not path.exists()
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed when the file is closed, however the process ends
        end, previous = _finished_end(file)
        lines = b""
        for entry in entries:
            line = _line(entry, previous)
            previous = hashlib.sha256(line).hexdigest()
            lines += line + b"\n"
        file.truncate(end)
        file.seek(end)
        try:
            while lines:  # a disk that is nearly full takes a part
                lines = lines[file.write(lines) :]
            if is_flushed:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if is_new:  # the name itself is an entry of its folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    return previous


def verify(path: Path, head: str = "") -> LogCheck:
    """Check the chain from its first line to its last, and that a line with the digest `head` is in it.

    Raises:
        IntegrityError: the log cannot be read, a line is not what the next one was chained to (the first such
            line is named), or no line has the digest `head`.
    """
    num_lines, previous, num_torn, is_found = 0, _START, 0, head in ("", _START)
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):  # only the last can lack its end
                    num_torn = len(line)
                    break
                num_lines += 1
                _check(path, num_lines, line, previous)
                previous = hashlib.sha256(line[:-1]).hexdigest()
                is_found = is_found or previous == head
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror})") from None
    if not is_found:
        raise IntegrityError(
            f"{path}: no line has the digest {head[:64]!r}: lines were cut from its end or replaced"
        )
    return LogCheck(num_lines, previous, num_torn)


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every finished line; check them first with `verify`."""
    with path.open("rb") as file:
        yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def _line(entry: Mapping[str, Any], previous: str) -> bytes:
    if {TIME, PREVIOUS} & entry.keys():
        raise ValueError(f"the fields {TIME} and {PREVIOUS} are the log's own")
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    # ASCII, so that no name from outside can move the cursor of a terminal that shows the log.
    return json.dumps({TIME: time, **entry, PREVIOUS: previous}, allow_nan=False).encode("ascii")


def _finished_end(file: BinaryIO) -> tuple[int, str]:
    """Return (where the finished lines end, the digest of the last of them)."""
    size, tail = file.seek(0, os.SEEK_END), _TAIL_BYTES
    while True:
        start = max(0, size - tail)
        file.seek(start)
        content = file.read(size - start)
        last = content.rfind(b"\n")
        begin = content.rfind(b"\n", 0, max(last, 0))
        if start == 0 or begin >= 0:
            break
        tail *= 4
    if last < 0:
        return 0, _START
    return start + last + 1, hashlib.sha256(content[begin + 1 : last]).hexdigest()


def _check(path: Path, number: int, line: bytes, previous: str) -> None:
    try:
        found = json.loads(line)[PREVIOUS]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise IntegrityError(f"{path}: line {number} is not a line of this log") from None
    if found != previous:
        raise IntegrityError(
            f"{path}: line {number} does not follow the line before it; one of them was changed"
        )
