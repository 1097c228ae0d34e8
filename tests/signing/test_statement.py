import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import IntegrityError
from fedllm.files import SIGNATURE, write_manifest
from fedllm.identity import load_key, new_key, public_text
from fedllm.signing.envelope import IN_TOTO, sign_envelope
from fedllm.signing.statement import (
    AdapterStatement,
    payload_of,
    read_statement,
    sign_adapter,
    signature_digest,
    signed_by,
    statement_of,
)

STATEMENT = AdapterStatement(
    name="ward",
    version=7,
    run={"name": "ward-7", "plan": "a" * 64, "config": "b" * 64},
    parents=({"relation": "retrained-from", "digest": "c" * 64},),
    base={"name": "org/base", "revision": "v1", "digest": "d" * 64},
    app={"version": "0.1.0", "source": "e" * 64, "bundle": ""},
    clients={"number": 2, "commitments": ["f" * 64, "0" * 64]},
    privacy={"unit": "example", "epsilon": 2.0, "delta": 1e-5},
    consent={"purpose": "triage", "consents": ["1" * 64]},
    memorisation={"extraction": 0.0},
    gates={"held-out": {"value": 1.2, "limit": 1.5, "passed": True}},
    unlearning={"class": "A"},
)


@pytest.fixture
def folder(tmp_path: Path, key: Ed25519PrivateKey) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(range(24)))
    (folder / "README.md").write_text("# A card\n")
    write_manifest(folder)
    sign_adapter(folder, STATEMENT, key)
    return folder


def test_a_statement_comes_back_whole(folder: Path, key: Ed25519PrivateKey) -> None:
    found, signer = signed_by(folder, [public_text(key)])
    assert set(found.files) == {"weights", "README.md", "manifest.json"}
    assert statement_of(payload_of(found)) == found
    assert (found.run, found.privacy, found.gates) == (STATEMENT.run, STATEMENT.privacy, STATEMENT.gates)
    assert (found.parents, found.epsilon, signer) == (STATEMENT.parents, 2.0, public_text(key))


def test_signing_twice_gives_the_same_bytes(folder: Path, key: Ed25519PrivateKey) -> None:
    before = signature_digest(folder)
    sign_adapter(folder, STATEMENT, key)
    assert signature_digest(folder) == before
    assert sorted(os.listdir(folder.parent)) == ["adapter", "key"]


def test_every_flipped_bit_is_found(folder: Path, key: Ed25519PrivateKey) -> None:
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            file.write_bytes(changed)
            with pytest.raises(IntegrityError, match=file.name):
                read_statement(folder, [public_text(key)])
        file.write_bytes(content)
    read_statement(folder, [public_text(key)])


def _replace_with_manifest(folder: Path) -> None:
    (folder / "weights").write_bytes(b"another")
    write_manifest(folder)


def _with_link(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)


def _with_listed_link(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)
    sign_adapter(folder, STATEMENT, load_key(folder.parent / "key"))


def _as_other_kind(folder: Path) -> None:
    (folder / SIGNATURE).write_text("{")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_replace_with_manifest, "manifest.json: changed"),
        (lambda folder: (folder / "weights").unlink(), "weights: missing"),
        (lambda folder: (folder / "run.py").write_text(""), "run.py: not listed"),
        (_with_link, "more: not listed"),
        (_with_listed_link, "more: changed"),  # what lies behind a link is not signed
        (lambda folder: (folder / SIGNATURE).unlink(), "no signature"),
        (_as_other_kind, "not an envelope"),
        (lambda folder: (folder / SIGNATURE).write_text("[" * 100_000), "not an envelope"),
    ],
)
def test_what_was_exchanged_is_named(
    change: Callable[[Path], object],
    named: str,
    folder: Path,
    key: Ed25519PrivateKey,
) -> None:
    change(folder)
    with pytest.raises(IntegrityError, match=named):
        read_statement(folder, [public_text(key)])


def test_another_key_vouches_for_nothing(folder: Path, key: Ed25519PrivateKey, tmp_path: Path) -> None:
    other = new_key(tmp_path / "other")
    with pytest.raises(IntegrityError, match="none of the trusted keys"):
        read_statement(folder, [public_text(other)])
    # Nor does a signature by another key under the trusted one's name.
    file = folder / SIGNATURE
    forged = sign_envelope(other, IN_TOTO, payload_of(STATEMENT)).decode()
    file.write_text(forged.replace(public_text(other), public_text(key)))
    with pytest.raises(IntegrityError, match="changed since it was signed"):
        read_statement(folder, [public_text(key)])


@pytest.mark.parametrize(
    ("kind", "payload", "named"),
    [
        ("application/json", payload_of(STATEMENT), "expected 'application/vnd.in-toto"),
        (IN_TOTO, b"not json", "not with the fields"),
        (IN_TOTO, payload_of(STATEMENT).replace(b"urn:fedllm", b"urn:other"), "not as a statement on"),
        (IN_TOTO, payload_of(STATEMENT).replace(b'"version":7', b'"version":"7"'), "not with the fields"),
        (IN_TOTO, payload_of(STATEMENT).replace(b'"gates"', b'"stages"'), "not with the fields"),
    ],
)
def test_what_is_signed_must_be_a_statement(
    kind: str,
    payload: bytes,
    named: str,
    folder: Path,
    key: Ed25519PrivateKey,
) -> None:
    (folder / SIGNATURE).write_bytes(sign_envelope(key, kind, payload))
    with pytest.raises(IntegrityError, match=named):
        read_statement(folder, [public_text(key)])


def test_securesystemslib_reads_and_verifies_it(folder: Path, key: Ed25519PrivateKey) -> None:
    dsse = pytest.importorskip("securesystemslib.dsse")
    from cryptography.hazmat.primitives import serialization
    from securesystemslib.signer import SSlibKey

    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    public = SSlibKey(public_text(key), "ed25519", "ed25519", {"public": raw.hex()})
    envelope = dsse.Envelope.from_dict(json.loads((folder / SIGNATURE).read_text()))
    assert set(envelope.verify([public], 1)) == {public.keyid}
    envelope.payload += b" "
    with pytest.raises(Exception, match="Accepted signatures"):
        envelope.verify([public], 1)
