"""The statement on an adapter: an in-toto statement (version 1) on all files of its folder, signed.

Its subjects are the SHA-256 of every file but the signature itself. Its predicate says how the adapter came
about: run, parents, base model, code, clients, privacy, consent, and which gates it has passed. It stands in
`adapter.sig.json` in the adapter's folder, in a DSSE envelope, which other tools verify as well.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import IntegrityError
from fedllm.files import SIGNATURE, file_digests, refuse_difference, write_bytes
from fedllm.signing.envelope import IN_TOTO, open_envelope, sign_envelope

_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "urn:fedllm:adapter:v1"


@dataclass(frozen=True, kw_only=True)
class AdapterStatement:
    """What a signer says of an adapter. What is not known is empty, and `None` where it does not apply.

    Digests are SHA-256 in hexadecimal. A parent is {"relation", "digest"}: "retrained-from" or
    "unlearned-from", and the digest of the earlier adapter's weights file. The commitments of clients bind
    each to the rows it trained on, and tell nobody else anything (docs/signing.md).
    """

    name: str
    version: int = 0  # 0 = none yet
    files: Mapping[str, str] = field(default_factory=dict)  # the subjects: path in the folder -> digest
    run: Mapping[str, str] = field(default_factory=dict)  # name, plan and config (digests)
    parents: tuple[Mapping[str, str], ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)  # name, revision, digest of all its files
    app: Mapping[str, str] = field(default_factory=dict)  # version, source and bundle (digests)
    clients: Mapping[str, Any] = field(default_factory=dict)  # number, commitments
    privacy: Mapping[str, Any] | None = None  # privacy.json (docs/privacy.md); None without a guarantee
    consent: Mapping[str, Any] = field(default_factory=dict)  # purpose, consents (digests)
    memorisation: Mapping[str, Any] = field(default_factory=dict)  # what an audit measured
    gates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # value, limit, passed
    unlearning: Mapping[str, Any] | None = None

    @property
    def epsilon(self) -> float | None:
        """The epsilon of the run's guarantee; None where it has none."""
        return None if self.privacy is None else float(self.privacy["epsilon"])


_KINDS: dict[str, tuple[type, ...]] = {
    **{item.name: (dict,) for item in fields(AdapterStatement)},
    **{"name": (str,), "version": (int,), "parents": (list,)},
    **{"privacy": (dict, NoneType), "unlearning": (dict, NoneType)},
}


def payload_of(statement: AdapterStatement) -> bytes:
    """Return the in-toto statement: JSON with sorted keys, the same bytes on every machine."""
    predicate = asdict(statement)
    subjects = [{"name": n, "digest": {"sha256": d}} for n, d in sorted(predicate.pop("files").items())]
    values = {"_type": _STATEMENT_TYPE, "predicateType": _PREDICATE_TYPE}
    whole = {**values, "subject": subjects, "predicate": predicate}
    return json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def statement_of(payload: bytes) -> AdapterStatement:
    """Return the statement that `payload_of` wrote.

    Raises:
        IntegrityError: it is another kind of statement, or holds other fields.
    """
    try:
        found = json.loads(payload)
        kind, values = (found["_type"], found["predicateType"]), {**found["predicate"]}
        values["files"] = {each["name"]: each["digest"]["sha256"] for each in found["subject"]}
        is_known = values.keys() == _KINDS.keys() and all(type(values[n]) in _KINDS[n] for n in _KINDS)
        values["parents"] = tuple(
            {name: str(each[name]) for name in ("relation", "digest")} for each in values["parents"]
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        is_known, kind, values = False, (_STATEMENT_TYPE, _PREDICATE_TYPE), {}
    if kind != (_STATEMENT_TYPE, _PREDICATE_TYPE):
        raise IntegrityError("signed, but not as a statement on an adapter")
    if not is_known:
        raise IntegrityError("signed, but not with the fields of this release's statements")
    return AdapterStatement(**values)


def sign_adapter(folder: Path, statement: AdapterStatement, key: Ed25519PrivateKey) -> AdapterStatement:
    """Sign a folder as it is, in place of an earlier signature; return the statement with its files.

    Raises:
        OSError: the signature cannot be written; the folder is then as before.
    """
    whole = replace(statement, files=file_digests(folder, but=(SIGNATURE,)))
    envelope, mode = sign_envelope(key, IN_TOTO, payload_of(whole)), folder.stat().st_mode & 0o644
    write_bytes(folder / SIGNATURE, envelope, aside=folder.parent, mode=mode)
    return whole


def read_statement(folder: Path, trusted: Collection[str]) -> AdapterStatement:
    """Return the statement on an adapter's folder, once signature and every file have been checked.

    `trusted` are public keys as text (`fedllm.identity.public_text`).

    Raises:
        IntegrityError: there is no signature, none by a trusted key, or a file is missing, extra or changed;
            the first thing that differs is named.
    """
    return signed_by(folder, trusted)[0]


def signed_by(folder: Path, trusted: Collection[str]) -> tuple[AdapterStatement, str]:
    """Return the statement on a folder and the key that signed it; raises as `read_statement`."""
    file = folder / SIGNATURE
    try:
        payload, signer = open_envelope(file.read_bytes(), trusted)
        statement = statement_of(payload)
    except OSError as error:
        raise IntegrityError(f"{file}: no signature ({error.strerror})") from None
    except IntegrityError as error:
        raise IntegrityError(f"{file}: {error}") from None
    refuse_difference(folder, statement.files, file_digests(folder, but=(SIGNATURE,)))
    return statement, signer


def signature_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of a folder's signature file.

    Raises:
        OSError: there is none.
    """
    return hashlib.sha256((folder / SIGNATURE).read_bytes()).hexdigest()
