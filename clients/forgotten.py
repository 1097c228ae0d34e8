"""Rows that a data holder has taken back: no run of this machine reads them again.

`forgotten.json` in the machine's private state has a salted hash of each. The hash of a row alone would tell
whoever finds the file whether a text that they guess is among them; the salt lies in the same file, so keep
it as private as the rows themselves.
"""

import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fedllm.data.fields import ClientRows, Example
from fedllm.data.shards import examples_digest
from fedllm.errors import CheckpointError
from fedllm.files import make_private_folder, write_file

FORGOTTEN = "forgotten.json"
_SALT_BYTES = 32


def forget_rows(state_path: Path, examples: Iterable[Example]) -> int:
    """Add rows to those that are forgotten on this machine, and return how many these now are.

    A row is known by what a run reads of it, so it is forgotten wherever the same columns are read.

    Raises:
        CheckpointError: the file cannot be written, or is damaged.
    """
    salt, known = _read(state_path)
    salt = salt or secrets.token_bytes(_SALT_BYTES)
    known |= {_hash(salt, example) for example in examples}
    try:
        make_private_folder(state_path)
        write_file(state_path / FORGOTTEN, json.dumps({"salt": salt.hex(), "rows": sorted(known)}) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{state_path / FORGOTTEN} cannot be written ({error.strerror}); nothing is forgotten yet"
        ) from None
    return len(known)


def without_forgotten(rows: ClientRows, state_path: Path) -> ClientRows:
    """Return a client's rows without those that are forgotten, copies of them included.

    Raises:
        CheckpointError: the file is damaged: to go on might train on a row that was taken back.
    """
    salt, known = _read(state_path)
    if not known:
        return rows
    train, held_out = (
        tuple(example for example in part if _hash(salt, example) not in known)
        for part in (rows.train, rows.held_out)
    )
    return replace(rows, train=train, held_out=held_out)


def _read(state_path: Path) -> tuple[bytes, set[str]]:
    """Return the salt and the hashes (hex); both are empty where nothing is forgotten."""
    file = state_path / FORGOTTEN
    try:
        content = json.loads(file.read_text())
        return bytes.fromhex(content["salt"]), set(content["rows"])
    except FileNotFoundError:
        return b"", set()
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{file}, which says what rows were taken back, is damaged; restore it"
        ) from None


def _hash(salt: bytes, example: Example) -> str:
    return hmac.digest(salt, examples_digest([example]).encode(), "sha256").hex()
