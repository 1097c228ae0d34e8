"""How long a round waits where that follows from the times its nodes took."""

from collections.abc import Callable, Iterable

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedllm.plan.run_plan import resolve
from scripts.runtimes.local import local_grid
from strategies.grid import transport as module
from strategies.grid.deadlines import FIRST_SECONDS, LEAST_SECONDS, MOST_SECONDS, MeasuredTimes
from strategies.grid.transport import Transport
from strategies.session import Session
from tests.builders import Clock


@pytest.mark.parametrize(
    ("answered", "missed", "expected"),
    [
        ([], [], FIRST_SECONDS),
        ([1.0, 2.0, 3.0], [], LEAST_SECONDS),  # a process that has died is noticed within that time
        ([100.0, 100.0, 100.0], [], 200.0),
        ([100.0, 100.0, 220.0], [], 330.0),  # a slower node, once it has answered
        ([100.0, 100.0, 5000.0], [], 400.0),  # a far slower one holds up nobody
        ([100.0, 100.0], [600.0], 200.0),
        ([100.0], [600.0, 600.0], 1200.0),  # too short for most
        ([], [3000.0], MOST_SECONDS),
        ([100.1, 100.1], [], 201.0),
    ],
)
def test_a_deadline_follows_the_median_of_the_nodes(
    answered: list[float], missed: list[float], expected: float
) -> None:
    times = MeasuredTimes()
    for node, seconds in enumerate(answered):
        times.note("train", node, seconds)
    for node, seconds in enumerate(missed, len(answered)):
        times.note_missed("train", node, seconds)
    assert times.deadline("train") == expected
    assert times.deadline("evaluate") == FIRST_SECONDS


def test_a_late_answer_replaces_the_deadline_it_missed() -> None:
    times = MeasuredTimes()
    times.note_missed("train", 1, 600.0)
    times.note("train", 1, 700.0)
    assert times.deadline("train") == 1400.0
    times.keep([2])
    assert times.deadline("train") == FIRST_SECONDS


SECONDS = {2: 100.0, 3: 150.0, 4: 1000.0, 5: 0.0}


@pytest.fixture
def deployment(make_config: Callable, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Grid:
    """Four nodes that answer after so many seconds; the last one reports an error at once."""

    def answer(message: Message, context: object) -> Message:
        content = message.content
        if message.metadata.dst_node_id == 5:
            content = RecordDict({"error": ConfigRecord({"code": "bad-data"})})
        return Message(content, reply_to=message)

    grid = local_grid(make_config(), answer, num_nodes=4)  # type: ignore[arg-type]
    pull, waiting = grid.pull_messages, grid._waiting

    def later(ids: Iterable[str]) -> list[Message]:
        nodes = {i: waiting[i].metadata.dst_node_id for i in ids if i in waiting}
        return list(pull([i for i, node in nodes.items() if clock.now >= SECONDS[node]]))

    monkeypatch.setattr(grid, "pull_messages", later)
    monkeypatch.setattr(Transport, "is_simulation", lambda self: False)
    return grid


def train(transport: Transport, nodes: Iterable[int], deadline: float) -> dict[int, str]:
    contents = {node: RecordDict() for node in nodes}
    replies = transport.exchange(contents, message_type="train", group="1", deadline=deadline)
    return {reply.node_id: reply.reason for reply in replies}


def test_a_round_waits_by_the_times_of_the_one_before(deployment: Grid, clock: Clock) -> None:
    transport = Transport(deployment, poll_seconds=1.0)
    reasons = train(transport, SECONDS, transport.usual_deadline("train"))
    assert {node for node, reason in reasons.items() if reason} == {4}
    assert clock.now == pytest.approx(FIRST_SECONDS, abs=2)
    # 100, 150 and at least 600: the error is no time of work
    assert transport.usual_deadline("train") == pytest.approx(302, abs=4)
    clock.now = 1000.0
    assert transport.node_ids() == [2, 3, 4, 5]
    assert transport.num_stale == 1
    assert transport.usual_deadline("train") == pytest.approx(4 * 151, abs=6)


def test_a_round_of_a_simulation_waits_600_seconds(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config({"federation.round-deadline": "auto"}))
    assert run.session.deadline("train") == FIRST_SECONDS
    run.session.transport.times.note("train", 2, 1.0)
    assert run.session.deadline("train") == FIRST_SECONDS


def test_a_number_of_seconds_is_the_deadline(deployment: Grid, make_config: Callable) -> None:
    transport = Transport(deployment)
    session = Session(resolve(make_config({"federation.round-deadline": 7.0})), None, transport, {})  # type: ignore[arg-type]
    assert session.deadline("train") == session.deadline("evaluate") == 7.0


def test_replies_of_a_large_cohort_are_taken_a_few_at_a_time(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = local_grid(make_config(), lambda message, context: Message(message.content, reply_to=message), 100)  # type: ignore[arg-type]
    one, most = grid.pull_messages, list[int]()

    def pull(ids: Iterable[str]) -> list[Message]:
        found = [reply for message_id in list(ids) for reply in one([message_id])]
        most.append(len(found))
        return found

    monkeypatch.setattr(grid, "pull_messages", pull)
    assert len(train(Transport(grid), grid.get_node_ids(), 60.0)) == 100
    assert max(most) == 16


def test_what_came_in_time_counts_however_busy_the_server_was(deployment: Grid, clock: Clock) -> None:
    transport = Transport(deployment, poll_seconds=1.0)
    contents = {node: RecordDict() for node in (2, 3)}
    reasons = []
    for reply in transport.exchange(contents, message_type="train", group="1", deadline=200.0):
        reasons.append(reply.reason)
        clock.now = 300.0
    assert reasons == ["", ""]


def test_a_node_that_has_just_gone_is_lost_and_nobody_else(
    deployment: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = deployment.push_messages
    monkeypatch.setattr(  # what Flower returns for a node it no longer knows
        deployment, "push_messages", lambda messages: ["", *list(push(messages))[1:]]
    )
    reasons = train(Transport(deployment, poll_seconds=1.0), (2, 3), 200.0)
    assert "Flower refused" in reasons[2]
    assert reasons[3] == ""
    monkeypatch.setattr(deployment, "push_messages", lambda messages: [])  # more than Flower takes at once
    assert all("too large" in reason for reason in train(Transport(deployment), (2, 3), 200.0).values())


def test_a_node_whom_the_question_did_not_reach_is_asked_again(
    deployment: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, push = Transport(deployment), deployment.push_messages
    monkeypatch.setattr(deployment, "push_messages", lambda messages: [])
    assert transport.ask_to_join() == set()
    monkeypatch.setattr(deployment, "push_messages", push)
    assert len(transport.ask_to_join()) == len(SECONDS)
    assert transport.silent == sorted(SECONDS)


@pytest.fixture(autouse=True)
def _clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", clock)
