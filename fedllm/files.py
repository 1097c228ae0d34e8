"""Files and folders that are either complete under their final name or not there at all."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from fedllm.errors import ConfigError, IntegrityError

MANIFEST = "manifest.json"
SIGNATURE = "adapter.sig.json"  # of a signed adapter (fedllm.signing); it signs the manifest too
_LOOK_SECONDS = 0.05  # more than a look at a lock takes
_UNFINISHED = re.compile(r"\.(?P<old>old-)?(?P<name>.+)-[a-z0-9_]{8}")  # as `tempfile` names them below


@contextmanager
def complete_folder(target: Path, *, is_public: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    A manifest with the SHA-256 of every file is added and all is flushed to disk before the rename, so a
    crash at any moment leaves the previous `target`, the new one, or none, never a mixture. Everybody on this
    machine may read a public one, this user alone any other.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target, since a rename is one step only within a file system.
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield building
        write_manifest(building)
        for file in sorted(building.rglob("*")):
            if is_public:  # safetensors writes 0600, whatever the umask
                file.chmod(0o755 if file.is_dir() else 0o644)
            if file.is_file():
                _flush(file)
        if is_public:
            building.chmod(0o755)
        _flush(building)
        if target.exists():  # a folder that holds files cannot be replaced by a rename
            old = Path(tempfile.mkdtemp(prefix=f".old-{target.name}-", dir=target.parent))
            target.rename(old / target.name)
            try:
                building.rename(target)
            except OSError:  # the previous folder goes back to its place
                (old / target.name).rename(target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            building.rename(target)
        _flush(target.parent)  # the rename itself is an entry of this folder
    finally:
        shutil.rmtree(building, ignore_errors=True)


def cache_folder() -> Path:
    """Return the folder of what can be made again, as converted models: $FEDLLM_CACHE or the user's cache."""
    root = os.environ.get("FEDLLM_CACHE")
    return Path(root) if root else user_cache_path("fedllm")


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file; Windows may have put a byte order mark before them.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is not TOML in UTF-8.
    """
    content = path.read_bytes()
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        if b"\0" not in content:
            raise ConfigError(f"{path}: not a TOML file ({error})") from None
    except UnicodeDecodeError:
        pass
    raise ConfigError(f"{path}: not a TOML file in UTF-8; save it as UTF-8")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of which little hangs; {} where it is absent or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_file(path: Path, text: str) -> None:
    """Replace a text file in one step; readers see the old text or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, *, aside: Path | None = None, mode: int = 0o600) -> None:
    """Replace a file in one step; readers see the old bytes or the new ones.

    It is built in the folder `aside`, by default the file's own: a kill may leave a half-written file there,
    and in some folders an extra file is an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=aside or path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a crash could leave the new name empty
        os.replace(name, path)
        _flush(path.parent)  # the new name is an entry of this folder: a power cut must not undo a charge
    finally:
        Path(name).unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left in `folder`: half-written files and folders, and those they replaced.

    Only for who alone writes there, since what another is writing looks the same. A folder that had been
    taken away for a new one that never came goes back to its place.
    """
    for path in folder.glob(".*-????????"):
        if found := _UNFINISHED.fullmatch(path.name):
            replaced, target = path / found["name"], folder / found["name"]
            if found["old"] and replaced.is_dir() and not target.exists():
                replaced.rename(target)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def write_once(path: Path, content: bytes) -> bytes:
    """Return the bytes of a file, on disk by then: `content`, unless somebody wrote the file before.

    Only this user can read a new one. Of several who write at once all get what the first has written.
    """
    if not path.exists():
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(name, path)  # unlike a rename it never replaces a file
            _flush(path.parent)
        finally:
            Path(name).unlink(missing_ok=True)
    return path.read_bytes()


@contextmanager
def locked(path: Path, *, makes: bool = True) -> Iterator[bool]:
    """Hold the lock of a file for the block, and yield whether it was free. An absent file is made, or not.

    The system frees the lock however the process ends.

    Raises:
        OSError: the file cannot be opened for writing.
    """
    with path.open("a" if makes else "r+") as file:
        yield _lock(file.fileno())


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file; where the file system has no locks, nobody does."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # only for this look
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock(descriptor: int) -> bool:
    for pause in (_LOOK_SECONDS, 0.0):  # once more, since it may only be looked at (`is_locked`)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(pause)
        except OSError:  # a network file system without locks: work there goes on without
            return True
        else:
            return True
    return False


def make_private_folder(folder: Path) -> None:
    """Make a folder that only this user can open, and as private the parents that are absent.

    `Path.mkdir` gives its mode to the last folder alone.
    """
    if not folder.exists():
        make_private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: the SHA-256 of every other file below `folder`, but for a signature."""
    digests = file_digests(folder, but=(MANIFEST, SIGNATURE))
    (folder / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=1, sort_keys=True) + "\n")


def verify_manifest(folder: Path) -> None:
    """Check every file below `folder` against its manifest.

    Raises:
        IntegrityError: the manifest is absent or unreadable, or a file is missing, extra or changed.
    """
    path = folder / MANIFEST
    try:
        expected = json.loads(path.read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path}: absent or unreadable, so nothing vouches for this folder") from None
    if not isinstance(expected, Mapping):
        raise IntegrityError(f"{path}: not a manifest")
    refuse_difference(folder, expected, file_digests(folder, but=(MANIFEST, SIGNATURE)))


def refuse_difference(folder: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the digests that a folder's files should have with those they have (`file_digests`).

    Raises:
        IntegrityError: a file is missing, extra, changed or no file; the first such file is named.
    """
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name) or not found[name]:
            state = "missing" if name not in found else "not listed" if name not in expected else "changed"
            raise IntegrityError(f"{folder / name}: {state}; restore the folder from a copy")


def file_digests(folder: Path, *, but: Collection[str] = ()) -> dict[str, str]:
    """Return the SHA-256 (hex) of every file below a folder by its place in it, without those named in `but`.

    What is neither a file nor a folder, such as a link to a folder, has "" for a digest, which never passes.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in but or (path.is_dir() and not path.is_symlink()):
            continue
        digests[name] = ""
        if path.is_file():
            with path.open("rb") as stream:
                digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
