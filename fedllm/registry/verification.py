"""Whether a registry is as it was written: its log, every version, every alias, and nothing else.

What a killed process may leave is no fault: the folder of a version whose line was never written, and an
alias or a `head` that is one line behind the log. The next change mends it.
"""

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedllm import chained_log
from fedllm.chained_log import LogCheck
from fedllm.errors import IntegrityError
from fedllm.files import SIGNATURE
from fedllm.registry.history import Added, History, history_of
from fedllm.registry.places import ALIASES, HEAD, LINEAGE, LOG, folder_name, lineage_file
from fedllm.signing.envelope import open_envelope
from fedllm.signing.statement import AdapterStatement, read_statement, statement_of

_OURS = {LOG, HEAD, ALIASES, LINEAGE}


@dataclass(frozen=True)
class Check:
    """What an intact registry holds: versions, their signers, lines of its log and the digest of the last.

    `unfinished` names what a killed process left: a folder that is no version, an alias that is one line
    behind the log. The next change mends it.
    """

    num_versions: int
    signers: tuple[str, ...]
    num_lines: int
    head: str
    unfinished: tuple[str, ...] = ()


@dataclass(frozen=True)
class Log:
    """An intact log: its check, the line that `head` notes, and the state before and after the last line."""

    check: LogCheck
    noted: str
    before: History
    history: History


def check_registry(folder: Path, trusted: Collection[str] = (), head: str = "") -> Check:
    """Check a whole registry, every file of every version included.

    `trusted` are the public keys that may have signed; with none, each version must be signed by the key that
    the log names. `head` is the digest of a line of the log that was noted elsewhere.

    Raises:
        IntegrityError: the log, a version, an alias or another file is not as it was written; it is named.
    """
    while True:
        log = read_log(folder, head)
        try:
            return _check_all(folder, log, trusted)
        except IntegrityError:
            if read_log(folder).check == log.check:
                raise  # else another process has changed the registry meanwhile: look again


def _check_all(folder: Path, log: Log, trusted: Collection[str]) -> Check:
    for number, added in log.history.added.items():
        check_version(folder, number, added, trusted)
    unfinished = [f"{ALIASES}/{alias}" for alias in check_aliases(folder, log)]
    left = folder_name(log.history.next_number)
    known = _OURS | {folder_name(number) for number in log.history.added}
    for path in _shown(folder):
        if path.name not in known | {left}:
            raise IntegrityError(f"{path}: not a part of this registry; move it elsewhere")
    return Check(
        len(log.history.added),
        tuple(dict.fromkeys(added.signer for added in log.history.added.values())),
        log.check.num_lines,
        log.check.head,
        (*unfinished, *([left] if (folder / left).exists() else ())),
    )


def read_log(folder: Path, head: str = "") -> Log:
    """Check the log of a registry from its first line to its last, and return what it says.

    Raises:
        IntegrityError: a line was changed, removed or inserted; the last one where `head` beside it says so.
    """
    path, noted = folder / LOG, folder / HEAD
    if not path.exists() and not noted.exists():
        return Log(LogCheck(0, ""), "", History(), History())
    # Read before the log: a change in another process writes the log first.
    last = noted.read_text().strip() if noted.exists() else ""
    check = chained_log.verify(path, last)
    if not last and check.num_lines > 1:
        raise IntegrityError(f"{noted}: missing, so nothing vouches for the last line of {path}")
    if head:
        chained_log.verify(path, head)
    entries = list(chained_log.read_entries(path))
    try:
        return Log(check, last, history_of(entries[:-1]), history_of(entries))
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from None


def check_version(folder: Path, number: int, added: Added, trusted: Collection[str] = ()) -> None:
    """Check every file of a version, and that its statement is the one that the log has.

    Raises:
        IntegrityError: a file, the signature or the number is another, or its signer is none of `trusted`.
    """
    own = folder / folder_name(number)
    logged_statement(folder, number, added)
    found = read_statement(own, trusted or (added.signer,))
    if (found.version, found.name) != (number, folder.resolve().name):
        raise IntegrityError(f"{own / SIGNATURE}: signed as version {found.version} of {found.name}")
    logged_lineage(folder, number, added)


def logged_statement(folder: Path, number: int, added: Added) -> AdapterStatement:
    """Return the statement of a version, which must be the one in the log; other files are not read.

    Raises:
        IntegrityError: it is missing or another.
    """
    file = folder / folder_name(number) / SIGNATURE
    try:
        content = file.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{file}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != added.digest:
        raise IntegrityError(f"{file}: not the signature that {folder / LOG} has for this version")
    return statement_of(open_envelope(content, (added.signer,))[0])


def logged_lineage(folder: Path, number: int, added: Added) -> bytes:
    """Return what the server keeps of a version's run, which must be what the log has; b"" without a run.

    Raises:
        IntegrityError: it is missing or another.
    """
    file = lineage_file(folder, number)
    content = file.read_bytes() if file.exists() else b""
    if (hashlib.sha256(content).hexdigest() if content else "") != added.lineage:
        raise IntegrityError(f"{file}: not the lineage that {folder / LOG} has for this version")
    return content


def check_aliases(folder: Path, log: Log) -> list[str]:
    """Compare every alias with the log, and return the names of those that are one line behind it.

    Raises:
        IntegrityError: one points elsewhere than the log says, or the log does not know it.
    """
    now, before, behind = log.history.current, log.before.current, []
    files = {path.name: path for path in _shown(folder / ALIASES)}
    for alias in sorted(now.keys() | files.keys()):
        found = files[alias].read_text(errors="replace").strip() if alias in files else None
        # A kill may come between a line and its alias, so the value before the last line is right too.
        allowed = [folder_name(each[alias]) if alias in each else None for each in (now, before)]
        if found not in allowed:
            wanted = allowed[0] or "no such alias"
            raise IntegrityError(f"{folder / ALIASES / alias}: says {found!r}, and the log says {wanted}")
        if found != allowed[0]:
            behind.append(alias)
    return behind


def _shown(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, without what is hidden: locks, and files that are being written."""
    yield from (path for path in sorted(folder.glob("*")) if not re.match(r"\.", path.name))
