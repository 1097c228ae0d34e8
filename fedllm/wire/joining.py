"""The question to join and its answer: the clients a node hosts, signed by its site where that has a key.

The question carries a nonce, fresh for every question. The answer's records:

    clients   ids, fingerprints of the base model, and codes of `CLIENT_ERROR_CODES` ("" for none)
    metrics   the sizes they declare, one column per name, one row per client
    site      the site's public key and its signature of the nonce, the run, the node and all of the above
    secure    in a run of secret sums: keys of the run, the site's signatures of them, whether it pins code
    publics   client -> its key for encryption, where sums are encrypted; its key of the run is the digest
    consent   commitments to the rows, and the site's signatures that these serve the run's purpose

A signature binds the declaration to one question of one run by one node: nobody can use it a second time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from secrets import token_hex
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm.data.partition import CLIENT_ID_FORM, is_client_id
from fedllm.errors import CLIENT_ERROR_CODES, WireError
from fedllm.identity import SIGNATURE_BYTES, statement, verify
from fedllm.messages import JoinedClient
from fedllm.secure.agreement import KEY_BYTES
from fedllm.wire.libraries import library_versions
from fedllm.wire.packets import LARGEST_NUMBER, list_field, packet_of, scalar_field, to_array
from fedllm.wire.refusals import read_error, write_error
from fedllm.wire.replies import number_rows, read_tables

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_NONCE = re.compile(r"[0-9a-f]{32}")
_NUMBERS = ("num_train", "num_held_out", "max_rank")
_TEXTS = ("client_id", "fingerprint", "cause")


@dataclass(frozen=True)
class Proof:
    """Who signed a declaration: a public key (`fedllm.identity.public_text`), and its signature."""

    public: str
    signature: bytes


def new_nonce() -> str:
    """Return 128 fresh random bits in hexadecimal."""
    return token_hex(16)


def write_question(nonce: str) -> RecordDict:
    """Return the question to join, which names the libraries of this machine."""
    libraries = ConfigRecord({**library_versions()})
    return RecordDict({"join": ConfigRecord({"nonce": nonce}), "libraries": libraries})


def read_question(content: RecordDict) -> str:
    """Return the nonce of a question to join.

    Raises:
        WireError: it has none, or one of another form.
    """
    nonce = content.config_records.get("join", ConfigRecord()).get("nonce")
    if not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
        raise WireError("the request to join has no nonce")
    return nonce


def join_statement(nonce: str, run: str, plan_digest: str, clients: Sequence[JoinedClient]) -> bytes:
    """Return what a site signs when its clients join a run of that name and configuration."""
    declared = [attrgetter("node_id", *_TEXTS, *_NUMBERS)(client) for client in clients]
    return statement(
        "fedllm join 1", {"nonce": nonce, "run": run, "plan": plan_digest, "clients": sorted(declared)}
    )


def consent_statement(run: str, plan_digest: str, purpose: str, client: JoinedClient) -> bytes:
    """Return what a site signs to consent that a client's rows serve a run: its purpose, and which rows."""
    values = {"run": run, "plan": plan_digest, "purpose": purpose}
    return statement("fedllm consent 1", {**values, "client": client.client_id, "rows": client.commitment})


def write_joined(clients: Sequence[JoinedClient], proof: Proof | None = None) -> RecordDict:
    """Return the answer: the clients of this node and the sizes they declare, with the site's proof."""
    if not clients:
        return write_error("no-data")
    ids, fingerprints, causes = ([getattr(client, name) for client in clients] for name in _TEXTS)
    content = RecordDict(
        {
            "clients": ConfigRecord({"ids": ids, "fingerprints": fingerprints, "causes": causes}),
            "metrics": MetricRecord(
                {name: [getattr(client, name) for client in clients] for name in _NUMBERS}
            ),
        }
    )
    if any(client.run_key for client in clients):
        keys, signatures = zip(*((client.run_key, client.key_signature) for client in clients), strict=True)
        pinned = all(client.is_pinned for client in clients)
        content["secure"] = ConfigRecord(
            {"keys": list(keys), "signatures": list(signatures), "pinned": pinned}
        )
    if publics := {client.client_id: client.public_key for client in clients if client.public_key}:
        content["publics"] = ArrayRecord({name: to_array(key) for name, key in publics.items()})
    if all(client.consent for client in clients):
        commitments, signatures = zip(*((one.commitment, one.consent) for one in clients), strict=True)
        content["consent"] = ConfigRecord({"commitments": list(commitments), "signatures": list(signatures)})
    if proof is not None:
        content["site"] = ConfigRecord({"key": proof.public, "signature": proof.signature})
    return content


def read_joined(content: RecordDict, node_id: int, *, most: int) -> list[JoinedClient]:
    """Return the clients a node declares, `most` at most; a node without data declares none.

    Raises:
        WireError: the answer is malformed or reports an error other than "no data".
    """
    if read_error(content) == "no-data":
        return []
    texts, columns = read_tables(
        content,
        ("ids", "fingerprints", "causes"),
        _NUMBERS,
        int,
        site=ConfigRecord,
        secure=ConfigRecord,
        publics=ArrayRecord,
        consent=ConfigRecord,
    )
    if len(texts["ids"]) > most:
        raise WireError(f"it declares {len(texts['ids']):,} clients, federation.num-clients is {most:,}")
    if not all(0 <= number < LARGEST_NUMBER for column in columns.values() for number in column):
        raise WireError(f"a join reply declares a number outside 0 to {LARGEST_NUMBER}")
    if not all(map(is_client_id, texts["ids"])):  # they are printed and written to files
        raise WireError(f"a join reply names a client by other than {CLIENT_ID_FORM}")
    if not all(map(_FINGERPRINT.fullmatch, texts["fingerprints"])):
        raise WireError("a join reply has a fingerprint that is not 64 hexadecimal digits")
    if not set(texts["causes"]) <= CLIENT_ERROR_CODES | {""}:
        raise WireError("a join reply carries a code that is not on the list")
    rows, keys = number_rows(texts["ids"], columns), _read_keys(content, texts["ids"])
    consents = _read_consents(content, texts["ids"])
    return [
        JoinedClient(
            node_id=node_id,
            client_id=name,
            fingerprint=fingerprint,
            cause=cause,
            **rows[name],
            **keys.get(name, {}),
            **consents.get(name, {}),
        )
        for name, fingerprint, cause in zip(*texts.values(), strict=True)
    ]


def _read_keys(content: RecordDict, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for each client its key of the run and what comes with it, {} where the node sends none."""
    record = content.config_records.get("secure", ConfigRecord())
    if not record:
        return {}
    keys, signatures = list_field(record, "keys", bytes), list_field(record, "signatures", bytes)
    lengths = {*map(len, keys)}, {*map(len, signatures)}
    if set(record) != {"keys", "signatures", "pinned"} or not len(ids) == len(keys) == len(signatures):
        raise WireError("a join reply has not one key of the run for each client")
    if lengths[0] != {KEY_BYTES} or not lengths[1] <= {0, SIGNATURE_BYTES}:
        raise WireError("a join reply has a key of the run, or its signature, of another length")
    pinned = scalar_field(record, "pinned", bool)
    publics = content.array_records.get("publics", ArrayRecord())
    if publics and set(publics) != set(ids):
        raise WireError("a join reply has not one key for encryption for each client")
    found = {name: packet_of(publics[name]) for name in publics}
    return {
        name: {
            "run_key": key,
            "key_signature": signature,
            "is_pinned": pinned,
            "public_key": found.get(name, b""),
        }
        for name, key, signature in zip(ids, keys, signatures, strict=True)
    }


def _read_consents(content: RecordDict, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for each client its commitment and its site's consent, {} where the node sends none."""
    record = content.config_records.get("consent", ConfigRecord())
    if not record:
        return {}
    commitments = list_field(record, "commitments", str)
    signatures = list_field(record, "signatures", bytes)
    if set(record) != {"commitments", "signatures"} or not len(ids) == len(commitments) == len(signatures):
        raise WireError("a join reply has not one consent for each client")
    if not all(map(_FINGERPRINT.fullmatch, commitments)) or {*map(len, signatures)} != {SIGNATURE_BYTES}:
        raise WireError("a join reply has a commitment or a consent of another form")
    return {
        name: {"commitment": commitment, "consent": signature}
        for name, commitment, signature in zip(ids, commitments, signatures, strict=True)
    }


def read_signer(content: RecordDict, signed: bytes) -> str:
    """Return the public key that signed an answer, whose statement is `signed`; "" where none did.

    Raises:
        WireError: there is a signature, and it is not of this statement and key.
    """
    record = content.config_records.get("site", ConfigRecord())
    if not record:
        return ""
    public: Any = record.get("key")
    signature: Any = record.get("signature")
    is_proof = (
        set(record) == {"key", "signature"} and isinstance(public, str) and isinstance(signature, bytes)
    )
    if not is_proof or not verify(public, signed, signature):
        raise WireError("its site's signature is not of this question, this run and what the node declares")
    return str(public)
