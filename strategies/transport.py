"""Messages over a Flower grid: send to nodes, take replies as they arrive, keep time, forget nobody.

Flower's own loop waits for all replies or an hour, and keeps offering a node that is still busy with an old
message. Here a phase ends at its deadline or when its caller stops listening; what arrives later is counted
and dropped, and its node is free again.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedllm.wire.packets import packet_bytes

_FLOWER_CODES = {2: "client error", 5: "node unavailable", 8: "client stopped responding"}


@dataclass(frozen=True, eq=False)
class Reply:
    """A node's answer: its content, or None and the reason there is none."""

    node_id: int
    content: RecordDict | None
    reason: str = ""


@dataclass(eq=False)
class Transport:
    """A grid with a memory of what is still under way. The one mutable object of a server."""

    grid: Grid
    poll_seconds: float = 0.1
    late: dict[str, int] = field(default_factory=dict)  # message id -> node, past its phase
    asked: set[int] = field(default_factory=set)  # nodes that were asked to join
    num_stale: int = 0  # replies that came after their phase
    bytes_down: int = 0  # packet bytes sent and received so far
    bytes_up: int = 0

    def node_ids(self) -> list[int]:
        """Return connected nodes that are not busy with an earlier message."""
        self._collect_late()
        busy = set(self.late.values())
        return sorted(node for node in self.grid.get_node_ids() if node not in busy)

    def exchange(
        self, contents: Mapping[int, RecordDict], *, message_type: str, group: str, deadline: float
    ) -> Iterator[Reply]:
        """Send one message per node and yield replies as they arrive, for `deadline` seconds.

        Every node is answered for exactly once: by its first reply, or by a reply without content.
        """
        messages = [
            Message(content, dst_node_id=node, message_type=message_type, group_id=group)
            for node, content in contents.items()
        ]
        pending = dict(zip(self.grid.push_messages(messages), contents, strict=True))
        self.bytes_down += sum(packet_bytes(content) for content in contents.values())
        ends = time.monotonic() + deadline
        try:
            while pending and time.monotonic() < ends:
                arrived = self._take(pending)
                yield from arrived
                if not arrived:
                    time.sleep(self.poll_seconds)
            for node in list(pending.values()):
                yield Reply(node, None, f"no reply within {deadline:g} s")
        finally:
            self.late.update(pending)

    def _take(self, pending: dict[str, int]) -> list[Reply]:
        """Return what has arrived, struck off `pending` at once: the caller may stop listening midway."""
        replies = []
        for message in self.grid.pull_messages(list(pending)):
            # A lost node's error comes from the SuperLink, so only the message it answers names it.
            node = pending.pop(message.metadata.reply_to_message_id, None)
            if node is not None:
                self.bytes_up += packet_bytes(message.content) if message.has_content() else 0
                replies.append(reply_of(message, node))
        return replies

    def _collect_late(self) -> None:
        for message in self.grid.pull_messages(list(self.late)) if self.late else ():
            self.num_stale += self.late.pop(message.metadata.reply_to_message_id, None) is not None


def reply_of(message: Message, node: int | None = None) -> Reply:
    """Return a message as the reply of `node`, by default the one it says it comes from."""
    node = message.metadata.src_node_id if node is None else node
    if message.has_error():
        # The text of a client's exception may quote a row: only Flower's numeric code is read.
        return Reply(node, None, _FLOWER_CODES.get(message.error.code, f"error {message.error.code}"))
    return Reply(node, message.content)
