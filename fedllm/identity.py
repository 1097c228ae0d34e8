"""The key by which a site proves who it is: Ed25519 (RFC 8032), made and kept at the site.

A site signs statements, the canonical text of named values, so that a signature given for one purpose is
of no use for another. The public half stands in the server's list of sites as `ed25519:` and 44 letters of
base64.
"""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedllm.errors import ConfigError
from fedllm.files import make_private_folder

_PREFIX = "ed25519:"
SIGNATURE_BYTES = 64
_OTHERS = 0o077  # what group and others may do with a file


def new_key(path: Path) -> Ed25519PrivateKey:
    """Make a key and write it to a new file (PEM, mode 0600); an existing file is never replaced.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        make_private_folder(path.parent)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; name another file, or keep the key it holds") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Return the key of a file that `new_key` wrote.

    Raises:
        ConfigError: the file cannot be read, others may read it, or it holds no such key.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except OSError as error:
        hint = "; `fedllm keys new` makes one" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path}: the key cannot be read ({error.strerror}){hint}") from None
    if mode & _OTHERS:
        raise ConfigError(f"{path}: others may read the key; run `chmod 600 {path}`")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: not an Ed25519 key without a password; `fedllm keys new` makes one")
    return key


def public_text(key: Ed25519PrivateKey) -> str:
    """Return the public half of a key as text: `ed25519:` and base64."""
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return _PREFIX + base64.b64encode(raw).decode()


def is_public_text(text: str) -> bool:
    """Return whether a text has the form of `public_text`."""
    return _public_key(text) is not None


def statement(kind: str, values: Mapping[str, Any]) -> bytes:
    """Return the bytes that a site signs: JSON with sorted keys, the same on every machine.

    `kind` says what the statement is for, such as "fedllm join 1".
    """
    return json.dumps([kind, values], sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sign(key: Ed25519PrivateKey, content: bytes) -> bytes:
    """Return the signature [64 bytes] of a statement."""
    return key.sign(content)


def verify(public: str, content: bytes, signature: bytes) -> bool:
    """Return whether the key of `public` (`public_text`) signed a statement."""
    key = _public_key(public)
    if key is None:
        return False
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _public_key(text: str) -> Ed25519PublicKey | None:
    try:
        raw = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
        # One text for each key: other spellings of the same bytes would be other names of one site.
        is_canonical = text == _PREFIX + base64.b64encode(raw).decode()
        return Ed25519PublicKey.from_public_bytes(raw) if is_canonical else None
    except (binascii.Error, ValueError):
        return None
