"""A site's withdrawal: the signed record that it takes part no longer, which anyone can check.

It holds the site's key, the names that its clients have at servers, and the time. Why a site withdraws stays
at the site.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.data.partition import is_client_id
from fedllm.errors import IntegrityError
from fedllm.identity import public_text, sign, statement, verify

MOST_BYTES = 1 << 16  # of a record: room for thousands of names
_KIND = "fedllm withdrawal 1"


@dataclass(frozen=True)
class Withdrawal:
    """What a site has signed: its public key, the clients that it withdraws, and when (ISO 8601, UTC).

    No `clients` stand for all that the site has ever spoken for.
    """

    site: str
    clients: tuple[str, ...]
    time: str

    def covers(self, site: str, client: str) -> bool:
        """Return whether a client that took part under a site's key has been withdrawn."""
        return site == self.site and (not self.clients or client in self.clients)


def sign_withdrawal(key: Ed25519PrivateKey, clients: Sequence[str], time: str) -> bytes:
    """Return the signed record, JSON."""
    values = {"site": public_text(key), "clients": sorted(clients), "time": time}
    signature = base64.b64encode(sign(key, statement(_KIND, values))).decode()
    return json.dumps({"withdrawal": values, "signature": signature}, sort_keys=True).encode()


def read_withdrawal(content: bytes) -> Withdrawal:
    """Return what a record says.

    Raises:
        IntegrityError: it is no such record, or the key that it names has not signed it.
    """
    try:
        if len(content) > MOST_BYTES:
            raise ValueError("too long")
        found = json.loads(content)
        values: dict[str, Any] = found["withdrawal"]
        signature = base64.b64decode(found["signature"], validate=True)
        is_signed = verify(str(values["site"]), statement(_KIND, values), signature)
        if base64.b64encode(signature).decode() != found["signature"]:  # one text for each signature
            raise ValueError("another spelling")
        read = Withdrawal(str(values["site"]), tuple(values["clients"]), str(values["time"]))
        datetime.fromisoformat(read.time)
        if not all(map(is_client_id, read.clients)):  # they are printed
            raise ValueError("no names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise IntegrityError("a withdrawal that is no signed record of a site") from None
    if not is_signed:
        raise IntegrityError("a withdrawal that the site's key has not signed")
    return read
