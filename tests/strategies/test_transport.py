from collections.abc import Callable, Iterable

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from scripts.runtimes.local import local_grid
from strategies.grid import transport as module
from strategies.grid.transport import Transport
from tests.builders import Clock


@pytest.fixture
def grid(make_config: Callable) -> Grid:
    """Two nodes of this process that answer with what they were asked."""

    def echo(message: Message, context: object) -> Message:
        return Message(message.content, reply_to=message)

    return local_grid(make_config(), echo, num_nodes=2)  # type: ignore[arg-type]


def replies_of(grid: Grid, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the nodes in the order in which they answered, in time that passes only in pauses."""
    monkeypatch.setattr(module, "time", clock)
    contents = {node: RecordDict({"asked": ConfigRecord({"node": node})}) for node in grid.get_node_ids()}
    exchange = Transport(grid).exchange(contents, message_type="query.x", group="1", deadline=100.0)
    return [reply.node_id for reply in exchange]


def test_nobody_waits_where_all_answers_are_there(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    assert replies_of(grid, clock, monkeypatch) == [2, 3]
    assert clock.now == 0.0


@pytest.mark.parametrize("seconds", [0.01, 0.3, 3.0, 50.0])
def test_an_answer_waits_little_next_to_its_round(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    clock, pull = Clock(), grid.pull_messages

    def late(message_ids: Iterable[str]) -> Iterable[Message]:
        clock.asked.append(clock.now)
        return pull(message_ids) if clock.now >= seconds else []

    monkeypatch.setattr(grid, "pull_messages", late)
    assert replies_of(grid, clock, monkeypatch) == [2, 3]
    assert seconds <= clock.now <= seconds + max(0.002, min(0.1, 0.03 * seconds))
    assert len(clock.asked) <= 300 + 10 * seconds  # and it is not asked for without pause
