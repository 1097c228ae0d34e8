"""DSSE envelopes: signed content of a stated type, as in-toto and Sigstore use them.

The signature is Ed25519 over the type and the content (the "pre-authentication encoding" of the DSSE
protocol, version 1), so content that was signed for one purpose is of no use for another. A key is named by
its public text (`fedllm.identity.public_text`).
"""

import base64
import json
from collections.abc import Collection

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import IntegrityError
from fedllm.identity import public_text, sign, verify

IN_TOTO = "application/vnd.in-toto+json"


def sign_envelope(key: Ed25519PrivateKey, payload_type: str, payload: bytes) -> bytes:
    """Return the envelope of a payload: JSON, the same bytes each time."""
    return _written(payload_type, payload, public_text(key), sign(key, _signed(payload_type, payload)))


def open_envelope(
    content: bytes, public_texts: Collection[str], payload_type: str = IN_TOTO
) -> tuple[bytes, str]:
    """Return the payload of an envelope, and which of the keys in `public_texts` has signed it.

    Raises:
        IntegrityError: it is not an envelope as `sign_envelope` writes one, of another type, signed by none
            of the keys, or was changed.
    """
    try:
        found = json.loads(content)
        (entry,) = found["signatures"]
        kind, signer = str(found["payloadType"]), str(entry["keyid"])
        payload, signature = (base64.b64decode(text) for text in (found["payload"], entry["sig"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise IntegrityError("not an envelope with one signature") from None
    if kind != payload_type:
        raise IntegrityError(f"signed as {kind[:80]!r}, expected {payload_type!r}")
    if signer not in public_texts:
        raise IntegrityError(f"signed by {signer[:80]!r}, which is none of the trusted keys")
    # Byte by byte, since base64 and JSON write the same values in many ways: each bit counts.
    is_whole = content == _written(kind, payload, signer, signature)
    if not is_whole or not verify(signer, _signed(kind, payload), signature):
        raise IntegrityError("changed since it was signed")
    return payload, signer


def _signed(payload_type: str, payload: bytes) -> bytes:
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _written(payload_type: str, payload: bytes, signer: str, signature: bytes) -> bytes:
    encoded, seal = (base64.b64encode(part).decode() for part in (payload, signature))
    envelope = {
        "payloadType": payload_type,
        "payload": encoded,
        "signatures": [{"keyid": signer, "sig": seal}],
    }
    return json.dumps(envelope, indent=1).encode() + b"\n"
