"""The request to join: a nonce asks, a signature answers, and neither is of use anywhere else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict

from fedllm.errors import WireError
from fedllm.identity import public_text, sign
from fedllm.messages import JoinedClient
from fedllm.wire.joining import (
    Proof,
    join_statement,
    new_nonce,
    read_joined,
    read_question,
    read_signer,
    write_joined,
    write_question,
)

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
NONCE = new_nonce()
CLIENTS = [
    JoinedClient(client_id=name, node_id=9, num_train=3, num_held_out=0, fingerprint="f" * 64, max_rank=2)
    for name in ("anna", "ben")
]
SAID: dict[str, Any] = {"nonce": NONCE, "run": "trial", "plan_digest": "d" * 64, "clients": CLIENTS}
SIGNED = join_statement(**SAID)


def answer(key: Ed25519PrivateKey = KEY, public: str = "", signed: bytes = SIGNED) -> RecordDict:
    return write_joined(CLIENTS, Proof(public or public_text(key), sign(key, signed)))


def test_the_signer_is_known_by_its_key() -> None:
    assert read_signer(answer(), SIGNED) == public_text(KEY)
    assert read_signer(write_joined(CLIENTS), SIGNED) == ""
    assert read_joined(answer(), 9, most=2) == CLIENTS


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": new_nonce()},
        {"run": "trial 2"},
        {"plan_digest": "e" * 64},
        {"clients": CLIENTS[:1]},
        {"clients": [CLIENTS[0], replace(CLIENTS[1], num_train=30)]},
        {"clients": [CLIENTS[0], replace(CLIENTS[1], client_id="cleo")]},
        {"clients": [CLIENTS[0], replace(CLIENTS[1], fingerprint="e" * 64)]},
        {"clients": [replace(client, node_id=8) for client in CLIENTS]},
    ],
)
def test_a_signature_is_of_one_answer_to_one_question(change: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="signature is not of this question"):
        read_signer(answer(signed=join_statement(**SAID | change)), SIGNED)


def test_the_order_of_clients_is_not_signed() -> None:
    assert join_statement(**SAID | {"clients": CLIENTS[::-1]}) == SIGNED


@pytest.mark.parametrize(
    "tamper",
    [
        lambda record: record.update(key=public_text(OTHER)),
        lambda record: record.update(key="ed25519:" + 3_000_000 * "A"),
        lambda record: record.update(key=7),
        lambda record: record.update(signature=b""),
        lambda record: record.update(signature="text"),
        lambda record: record.update(note="text"),
        lambda record: record.pop("key"),
        lambda record: record.pop("signature"),
    ],
)
def test_a_proof_of_any_other_form_is_refused(tamper: Callable[[Any], None]) -> None:
    content = answer()
    tamper(content["site"])
    with pytest.raises(WireError, match="signature is not of this question") as caught:
        read_signer(content, SIGNED)
    assert len(str(caught.value)) < 200


def test_more_clients_than_the_run_has_are_refused() -> None:
    with pytest.raises(WireError, match=r"declares 2 clients, federation\.num-clients is 1"):
        read_joined(answer(), 9, most=1)


def test_a_question_has_a_nonce() -> None:
    assert read_question(write_question(NONCE)) == NONCE
    assert new_nonce() != new_nonce()
    for nonce in ("", "f" * 31, "F" * 32, 7, b"x" * 32):
        with pytest.raises(WireError, match="no nonce"):
            read_question(RecordDict({"join": ConfigRecord({"nonce": nonce})}))
    with pytest.raises(WireError, match="no nonce"):
        read_question(RecordDict())


def with_keys(**changes: Any) -> RecordDict:
    keyed = [
        replace(client, run_key=bytes([place] * 32), key_signature=bytes(64), is_pinned=True)
        for place, client in enumerate(CLIENTS, start=1)
    ]
    content = write_joined(keyed)
    content["secure"].update(changes)
    return content


def test_keys_of_a_run_come_with_their_clients() -> None:
    joined = read_joined(with_keys(), 9, most=2)
    assert [(one.run_key, one.key_signature, one.is_pinned) for one in joined] == [
        (bytes([1] * 32), bytes(64), True),
        (bytes([2] * 32), bytes(64), True),
    ]
    assert "secure" not in write_joined(CLIENTS)


def test_keys_for_encryption_come_for_all_clients_or_none() -> None:
    keyed = [replace(client, run_key=bytes(32), public_key=client.client_id.encode()) for client in CLIENTS]
    content = write_joined(keyed)
    assert [one.public_key for one in read_joined(content, 9, most=2)] == [b"anna", b"ben"]
    del content["publics"]["ben"]
    with pytest.raises(WireError, match="key for encryption"):
        read_joined(content, 9, most=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": [bytes(32)]},
        {"keys": [bytes(32), bytes(31)]},
        {"keys": ["a" * 32, "b" * 32]},
        {"signatures": [bytes(64), bytes(63)]},
        {"pinned": 1},
        {"more": "text"},
    ],
)
def test_keys_of_another_form_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        read_joined(with_keys(**changes), 9, most=2)
