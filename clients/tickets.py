"""Who may ask a site's service: a launcher shows its node's launch key, and gets a ticket for one answer.

The service believes no word of a messenger about its node, server or bundle: they follow from the ticket.
"""

import secrets
import time
from collections.abc import Mapping

from clients.gate import Sender
from clients.site_protocol import digest_of

_LIFE_SECONDS = 600.0  # a ticket is used at once; one of a launcher that died must not lie about
_MOST = 1000


class Tickets:
    """The tickets that are out. `nodes` says whose launch key (its SHA-256, hex) is which node's."""

    def __init__(self, nodes: Mapping[str, str]) -> None:
        self._nodes = nodes
        self._out: dict[str, tuple[float, Sender]] = {}

    def node_of(self, launch_key: str) -> str | None:
        """Return the node that a launch key is of."""
        # Compared by digest: how long a look-up takes tells nothing of a key.
        return self._nodes.get(digest_of(launch_key))

    def issue(self, sender: Sender) -> str:
        """Return a new ticket for one answer to `sender`."""
        now = time.monotonic()
        self._out = {key: one for key, one in self._out.items() if one[0] > now}
        while len(self._out) >= _MOST:
            del self._out[next(iter(self._out))]
        ticket = secrets.token_urlsafe(32)
        self._out[digest_of(ticket)] = (now + _LIFE_SECONDS, sender)
        return ticket

    def redeem(self, ticket: str) -> Sender | None:
        """Return whose ticket it is, once; None where it is nobody's."""
        ends, sender = self._out.pop(digest_of(ticket), (0.0, None))
        return sender if time.monotonic() < ends else None
