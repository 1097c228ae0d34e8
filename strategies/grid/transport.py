"""Messages over a Flower grid: send to nodes, take replies as they arrive, keep time, forget nobody.

Flower's own loop waits for all replies or an hour, and keeps offering a node that is still busy with an old
message. Here a phase ends at its deadline or when its caller stops listening. What arrives later is counted
and dropped, or kept for the next round that asks for late replies (`keeps_late`); its node is free again.
Requests to join have no phase: their answers are taken whenever they come.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType

from fedllm.errors import WireError
from fedllm.runs.records import RoundPlan
from fedllm.wire.joining import new_nonce, write_question
from fedllm.wire.packets import packet_bytes
from fedllm.wire.refusals import read_error
from strategies.grid.deadlines import FIRST_SECONDS, MeasuredTimes

CRASHED = "client error"
GRACE_SECONDS = 30.0
_SHORTEST_PAUSE = 0.002  # seconds
_PAUSE_SHARE = 0.02
_AT_ONCE = 16  # messages that one look asks for: all replies of a large cohort might not fit into memory
_NOT_SENT = "Flower refused its message: the node is gone, or the message is too large"
_FLOWER_CODES = {2: CRASHED, 5: "node unavailable", 8: "client stopped responding"}


@dataclass(frozen=True, eq=False)
class Reply:
    """A node's answer: its content, or None and the reason there is none; `plan` of the round that asked."""

    node_id: int
    content: RecordDict | None
    reason: str = ""
    plan: RoundPlan | None = None

    def received(self) -> RecordDict:
        """Return the content.

        Raises:
            WireError: there is none; it says why.
        """
        if self.content is None:
            raise WireError(self.reason)
        return self.content


@dataclass(frozen=True, eq=False)
class Sent:
    """A message under way: its node, its type, when it was sent, and the round it belongs to, if any."""

    node: int
    message_type: str
    began: float
    plan: RoundPlan | None = None


@dataclass(eq=False)
class Transport:
    """A grid with a memory of what is still under way."""

    grid: Grid
    poll_seconds: float = 0.1
    heard: Callable[[Sent, Reply], None] = lambda sent, reply: None  # called with every reply
    keeps_late: bool = False  # whether a late reply to a round counts in a later one
    late: dict[str, Sent] = field(default_factory=dict)  # by message id: what nodes are still busy with
    overdue: list[Reply] = field(default_factory=list)  # late replies that no round has taken yet
    asked: dict[int, float] = field(default_factory=dict)  # node asked to join -> when it may be again
    joining: dict[str, Sent] = field(default_factory=dict)  # by message id: requests that have no answer yet
    nonces: dict[int, str] = field(default_factory=dict)  # node -> what it was last asked to join with
    times: MeasuredTimes = field(default_factory=MeasuredTimes)
    refused: dict[int, str] = field(default_factory=dict)  # node -> why it did not join, when last asked
    num_stale: int = 0  # replies that came after their phase
    bytes_down: int = 0  # packet bytes sent and received so far
    bytes_up: int = 0

    def node_ids(self) -> list[int]:
        """Return connected nodes that are not busy with an earlier message."""
        self._collect_late()
        connected = list(self.grid.get_node_ids())
        self.times.keep(connected)
        busy = {sent.node for sent in (*self.late.values(), *self.joining.values())}
        return sorted(node for node in connected if node not in busy)

    @property
    def silent(self) -> list[int]:
        """The nodes that have not answered a request to join yet."""
        return sorted(sent.node for sent in self.joining.values())

    def is_simulation(self) -> bool:
        """Return whether all nodes are there from the start, and work in turns."""
        return self.grid.run.primary_task_type == TaskType.SIMULATION

    @property
    def bundle(self) -> str:
        """The SHA-256 of the code that Flower ships to the nodes, "" where it ships none."""
        return self.grid.run.fab_hash

    def usual_deadline(self, message_type: str) -> float:
        """Return how long to wait for the answers to messages of a type, by the times of earlier ones.

        The nodes of a simulation wait for each other, so that their times say little: they get 600 s.
        """
        return FIRST_SECONDS if self.is_simulation() else self.times.deadline(message_type)

    def have_all_answered(self, num_expected: int, num_declared: int) -> bool:
        """Return whether no connected node will answer otherwise to the request to join, and none is missing.

        A simulation's nodes are all there from the start. Elsewhere a node is expected for every client
        that is not declared yet, unless it has refused; one that then went away may come back mended.
        """
        nodes = list(self.grid.get_node_ids())
        if not nodes or self.joining or any(self.asked.get(node) != math.inf for node in nodes):
            return False
        if self.is_simulation():
            return True
        return num_declared + sum(node in self.refused for node in nodes) >= num_expected

    def words_of(self, node: int) -> str:
        """Return what a node of this very process said of its last error, "" for nodes elsewhere."""
        words: Mapping[int, str] = getattr(self.grid, "errors", {})
        return words.get(node, "")

    def ask_to_join(self) -> set[str]:
        """Ask the connected nodes that were not asked yet, or may be again; return the messages' ids."""
        now = time.monotonic()
        new = [node for node in self.node_ids() if self.asked.get(node, now) <= now]
        self.nonces.update((node, new_nonce()) for node in new)
        questions = {node: write_question(self.nonces[node]) for node in new}
        sent = self._send(questions, message_type="query.join", group="join")
        self.asked.update((each.node, math.inf) for each in sent.values())  # whom Flower refused, next time
        self.joining.update(sent)
        return set(sent)

    def join_replies(self) -> Iterator[Reply]:
        """Yield the answers to requests to join that have come since the last call."""
        while replies := self._take(self.joining):
            yield from replies

    def exchange(
        self,
        contents: Mapping[int, RecordDict],
        *,
        message_type: str,
        group: str,
        deadline: float,
        plan: RoundPlan | None = None,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> Iterator[Reply]:
        """Send one message per node and yield replies as they arrive, for `deadline` seconds.

        Once `is_enough` says so, those that are left have `GRACE_SECONDS` from the beginning. Every node is
        answered for exactly once: by its first reply, or by a reply without content. A phase that belongs to
        a round, `plan`, also yields what was late for earlier ones, where that is kept.
        """
        wants_late = plan is not None and self.keeps_late
        pending = self._send(contents, message_type=message_type, group=group, plan=plan)
        began = time.monotonic()
        unsent = contents.keys() - {sent.node for sent in pending.values()}
        arrived = [Reply(node, None, _NOT_SENT, plan) for node in contents if node in unsent]
        arrived += self._take_overdue() if wants_late else []
        try:
            while arrived or (pending and time.monotonic() - began < deadline):
                while arrived:
                    yield arrived.pop(0)
                if is_enough():
                    deadline = min(deadline, GRACE_SECONDS)
                arrived = self._take(pending)
                if wants_late:
                    arrived = self._take_overdue() + arrived
                if pending and not arrived:
                    time.sleep(self._pause(time.monotonic() - began))
            for arrived in self._look(pending):  # what came in time while the caller was busy with another
                while arrived:
                    yield arrived.pop(0)
            for sent in list(pending.values()):
                self.times.note_missed(message_type, sent.node, deadline)
                yield Reply(sent.node, None, f"no reply within {deadline:g} s", plan)
        finally:
            self.late.update(pending)
            if wants_late:  # the caller has stopped listening before it had them all
                self.overdue += arrived

    def _pause(self, waited: float) -> float:
        """Return how long to wait before the next look: little next to how long it has taken already."""
        return min(self.poll_seconds, max(_SHORTEST_PAUSE, waited * _PAUSE_SHARE))

    def _send(
        self,
        contents: Mapping[int, RecordDict],
        *,
        message_type: str,
        group: str,
        plan: RoundPlan | None = None,
    ) -> dict[str, Sent]:
        """Send one message per node; return what is under way by the message's id.

        A node that has just gone has no message: Flower refuses it, with an empty id.
        """
        messages = [
            Message(content, dst_node_id=node, message_type=message_type, group_id=group)
            for node, content in contents.items()
        ]
        self.bytes_down += sum(packet_bytes(content) for content in contents.values())
        ids, now = list(self.grid.push_messages(messages)), time.monotonic()
        ids += [""] * (len(messages) - len(ids))  # none at all where Flower found them too large
        return {
            message_id: Sent(node, message_type, now, plan)
            for message_id, node in zip(ids, contents, strict=True)
            if message_id
        }

    def _take(self, pending: dict[str, Sent]) -> list[Reply]:
        """Return some of what has arrived, [] where nothing has."""
        return next(filter(None, self._look(pending)), [])

    def _look(self, pending: dict[str, Sent]) -> Iterator[list[Reply]]:
        """Yield what has arrived of a few messages after the other, struck off `pending` at once.

        The caller may stop listening midway.
        """
        ids = list(pending)
        for start in range(0, len(ids), _AT_ONCE):
            replies = []
            for message in self.grid.pull_messages(ids[start : start + _AT_ONCE]):
                # A lost node's error comes from the SuperLink, so only the message it answers names it.
                sent = pending.pop(message.metadata.reply_to_message_id, None)
                if sent is not None:
                    replies.append(self._received(message, sent))
            yield replies

    def _take_overdue(self) -> list[Reply]:
        self._collect_late()
        taken, self.overdue = self.overdue, []
        return taken

    def _collect_late(self) -> None:
        for reply in chain.from_iterable(self._look(self.late)):
            if reply.plan is not None and self.keeps_late:
                self.overdue.append(reply)
            else:
                self.num_stale += 1

    def _received(self, message: Message, sent: Sent) -> Reply:
        self.bytes_up += packet_bytes(message.content) if message.has_content() else 0
        reply = replace(reply_of(message, sent.node), plan=sent.plan)
        self.heard(sent, reply)
        # Who is gone or refuses answers at once, which says nothing of how long the others will take.
        if reply.content is not None and read_error(reply.content) is None:
            self.times.note(sent.message_type, sent.node, time.monotonic() - sent.began)
        return reply


def reply_of(message: Message, node: int | None = None) -> Reply:
    """Return a message as the reply of `node`, by default the one it says it comes from."""
    node = message.metadata.src_node_id if node is None else node
    if message.has_error():
        # The text of a client's exception may quote a row: only Flower's numeric code is read.
        return Reply(node, None, _FLOWER_CODES.get(message.error.code, f"error {message.error.code}"))
    return Reply(node, message.content)
