"""What a run holds on to from round to round, and whom it tells."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedllm.adapters.layout import AdapterLayout
from fedllm.config import RunConfig
from fedllm.types import ClientFailure, ClientUpdate, JoinedClient, RoundRecord
from strategies.transport import Transport


@dataclass(frozen=True)
class Watch:
    """What the person who started the run wants to hear; every callable may be left out."""

    notice: Callable[[str], None] = lambda line: None
    joined: Callable[[Mapping[str, JoinedClient]], None] = lambda clients: None
    client: Callable[[int, ClientUpdate | ClientFailure], None] = lambda round_num, result: None
    record: Callable[[RoundRecord], None] = lambda record: None


SILENT = Watch()


@dataclass(frozen=True, eq=False)
class Session:
    """What stays the same from round to round, but for clients that join later."""

    config: RunConfig
    layout: AdapterLayout
    transport: Transport
    clients: dict[str, JoinedClient]
    watch: Watch = SILENT

    def by_node(self, clients: Iterable[str]) -> dict[int, list[str]]:
        """Group client ids by the node that hosts them, keeping their order."""
        grouped: dict[int, list[str]] = {}
        for client in clients:
            grouped.setdefault(self.clients[client].node_id, []).append(client)
        return grouped
