from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import ConfigError
from fedllm.identity import is_public_text, load_key, new_key, public_text, sign, statement, verify

SAID = statement("fedllm join 1", {"run": "trial", "clients": [["anna", 3]]})


def test_a_key_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "site.key"
    key = new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert public_text(load_key(path)) == public_text(key)


def test_only_its_own_statement_is_signed() -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    signature = sign(key, SAID)
    assert verify(public_text(key), SAID, signature)
    assert not verify(public_text(other), SAID, signature)
    assert not verify(public_text(key), SAID + b" ", signature)
    assert not verify(public_text(key), SAID, signature[:-1])
    assert not verify(public_text(key), SAID, bytes([signature[0] ^ 1]) + signature[1:])


def test_a_statement_is_of_one_kind_and_one_spelling() -> None:
    assert statement("a", {"x": 1, "y": 2}) == statement("a", {"y": 2, "x": 1})
    assert statement("a", {"x": 1}) != statement("b", {"x": 1})


def test_a_public_key_has_one_spelling() -> None:
    text = public_text(Ed25519PrivateKey.generate())
    assert is_public_text(text)
    assert not is_public_text(f" {text}")
    assert not is_public_text(text.upper())
    assert not is_public_text(text[:-1])
    assert not verify(text[8:], SAID, bytes(64))


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    new_key(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"others may read the key; run `chmod 600"):
        load_key(path)


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    new_key(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        new_key(path)
    assert path.read_bytes() == before


def test_what_is_no_key_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    with pytest.raises(ConfigError, match="`fedllm keys new` makes one"):
        load_key(path)
    locked = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    for content in (
        b"",
        b"\0secret",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        locked,
    ):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="not an Ed25519 key") as caught:
            load_key(path)
        assert "\n" not in str(caught.value)
