"""Slow nodes: their updates are folded into the round they arrive in, by their age, once, or not at all."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from clients.client_app import app
from fedllm.messages import ClientUpdate
from scripts.runtimes.local import local_grid
from strategies.cohort.late_updates import staleness_weight
from strategies.rounds import next_round
from strategies.run import run_federation
from strategies.session import Watch

BEN = 3  # his node
BUFFERED = {"federation.max-staleness": 2, "aggregation.read-out": "factor-mean", "wire.codec": "fp32"}
OVER = {"federation.cohort": 3, "federation.over-selection": 4 / 3}
EVERYBODY = ("anna", "ben", "cleo", "dora")


@pytest.fixture
def open_slow(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Return a function (**flat) -> (run, set of nodes that do not answer yet, updates heard by round)."""

    def start(**flat: Any) -> tuple[Any, set[int], dict[int, dict[str, ClientUpdate]]]:
        run = open_run(make_config({**BUFFERED, **flat}))
        hanging, heard = set[int](), dict[int, dict[str, ClientUpdate]]()
        pull = run.grid.pull_messages

        def pull_from_those_that_answer(ids: Iterable[str]) -> list[Message]:
            waiting = run.grid._waiting
            answering = [i for i in ids if i in waiting and waiting[i].metadata.dst_node_id not in hanging]
            return pull(answering)

        def hear(round_num: int, answer: Any) -> None:
            if isinstance(answer, ClientUpdate):
                heard.setdefault(round_num, {})[answer.client_id] = answer

        monkeypatch.setattr(run.grid, "pull_messages", pull_from_those_that_answer)
        object.__setattr__(run.session, "watch", Watch(notice=run.notices.append, client=hear))
        return run, hanging, heard

    return start


def test_a_late_update_counts_with_the_weight_of_its_age(open_slow: Callable) -> None:
    run, hanging, heard = open_slow(**OVER)
    hanging.add(BEN)
    first, record = next_round(run.session, run.state)
    assert (record.asked, record.accepted) == (EVERYBODY, ("anna", "cleo", "dora"))
    assert record.staleness == {}
    hanging.clear()
    second, record = next_round(run.session, first)
    assert record.asked == ("anna", "cleo", "dora"), "a busy node is not asked"
    assert record.accepted == ("anna", "cleo", "ben"), "the round closes with its third update"
    assert record.staleness == {"ben": 1}
    assert record.weights == pytest.approx({"anna": 4.0, "cleo": 8.0, "ben": 6.0 * 2**-0.5})
    total = sum(record.weights.values())
    change = sum(record.weights[name] / total * heard[2][name].delta.double() for name in record.weights)
    expected = first.adapter.vector.double() + change
    torch.testing.assert_close(second.adapter.vector.double(), expected, rtol=0, atol=1e-6)
    assert second.num_drawn == {"anna": 8, "ben": 4, "cleo": 8, "dora": 4}


def test_a_late_a_counts_and_its_client_keeps_the_b_it_had(open_slow: Callable, tmp_path: Path) -> None:
    fedsa = {"aggregation.read-out": "local-b", "run.output": str(tmp_path)}
    run, hanging, heard = open_slow(**OVER, **fedsa)
    hanging.add(BEN)
    first, _ = next_round(run.session, run.state)
    hanging.clear()
    second, record = next_round(run.session, first)
    assert record.staleness == {"ben": 1}
    total = sum(record.weights.values())
    change = sum(record.weights[name] / total * heard[2][name].delta.double() for name in record.weights)
    expected = first.adapter.vector.double() + change
    torch.testing.assert_close(second.adapter.vector.double(), expected, rtol=0, atol=1e-6)
    assert second.num_drawn["ben"] == 4
    (file,) = (tmp_path / "run" / "private").rglob("ben/*.safetensors")
    assert file.name == "drawn-000000000004.safetensors"


def test_a_late_update_is_of_the_round_that_asked_for_it(
    open_slow: Callable, make_config: Callable, open_run: Callable
) -> None:
    prompt = open_run(make_config(BUFFERED))
    alone, _ = next_round(prompt.session, prompt.state)
    slow, hanging, heard = open_slow(**OVER)
    hanging.add(BEN)
    state, _ = next_round(slow.session, slow.state)
    hanging.clear()
    next_round(slow.session, state)
    assert heard[2]["ben"].round_num == 1
    heard_alone: dict[str, ClientUpdate] = {}
    again = open_run(make_config(BUFFERED))
    watch = Watch(client=lambda _, answer: heard_alone.setdefault(answer.client_id, answer))
    object.__setattr__(again.session, "watch", watch)
    state, _ = next_round(again.session, again.state)
    assert state.adapter.digest == alone.adapter.digest
    assert torch.equal(heard[2]["ben"].delta, heard_alone["ben"].delta)


@pytest.mark.parametrize("rounds_away", [2, 3])
def test_an_update_above_the_largest_staleness_is_named(rounds_away: int, open_slow: Callable) -> None:
    run, hanging, _ = open_slow(**OVER)
    hanging.add(BEN)
    state = run.state
    for _ in range(rounds_away):
        state, record = next_round(run.session, state)
        assert "ben" not in record.accepted
        assert record.lost == {}
    hanging.clear()
    state, record = next_round(run.session, state)
    if rounds_away == 2:
        assert record.staleness == {"ben": 2}
        assert run.notices == []
    else:
        assert record.accepted == ("anna", "cleo", "dora")
        assert run.notices == ["client ben: its update of round 1 is 3 rounds late"]
        assert state.num_drawn == {"anna": 16, "cleo": 16, "dora": 16}
        _, record = next_round(run.session, state)
        assert record.asked == EVERYBODY, "its node is free again"


def test_a_reply_after_the_deadline_counts_in_the_next_round(open_slow: Callable) -> None:
    run, hanging, _ = open_slow(**{"federation.round-deadline": 1.0})
    hanging.add(BEN)
    state, record = next_round(run.session, run.state)
    assert record.lost == {"ben": "no reply within 1 s"}
    hanging.clear()
    run.session.transport.node_ids()  # it arrives between the rounds
    state, record = next_round(run.session, state)
    assert record.asked == ("anna", "cleo", "dora"), "one update a client and round"
    assert record.accepted == ("anna", "cleo", "dora", "ben")
    assert record.staleness == {"ben": 1}
    _, record = next_round(run.session, state)
    assert (record.asked, record.staleness) == (EVERYBODY, {})


def test_a_reply_to_an_earlier_attempt_is_not_stale(open_slow: Callable) -> None:
    run, hanging, _ = open_slow(**{"federation.min-clients": 4, "federation.round-deadline": 1.0})
    hanging.add(BEN)
    notice = run.notices.append

    def back(line: str) -> None:  # he answers once the first attempt is given up
        notice(line)
        hanging.clear()

    object.__setattr__(run.session, "watch", Watch(notice=back))
    _, record = next_round(run.session, run.state)
    assert record.attempt == 2
    assert record.accepted == ("anna", "cleo", "dora", "ben")
    assert record.staleness == {}
    assert record.weights == {"anna": 4.0, "ben": 6.0, "cleo": 8.0, "dora": 10.0}


def test_what_arrives_beyond_the_cohort_counts_next_round(
    open_slow: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = open_slow(**{"federation.cohort": 2, "federation.over-selection": 2.0})
    one_by_one = run.grid.pull_messages

    def pull(ids: Iterable[str]) -> list[Message]:  # a SuperLink hands out all replies that have come
        return [reply for message_id in list(ids) for reply in one_by_one([message_id])]

    monkeypatch.setattr(run.grid, "pull_messages", pull)
    state, record = next_round(run.session, run.state)
    assert record.accepted == ("anna", "ben")
    state, record = next_round(run.session, state)
    assert record.asked == ("anna", "ben")
    assert record.accepted == ("cleo", "dora")
    assert record.staleness == {"cleo": 1, "dora": 1}
    assert state.num_drawn == dict.fromkeys(EVERYBODY, 4)


def test_an_unsound_late_reply_is_named_and_costs_nobody(open_slow: Callable) -> None:
    run, hanging, _ = open_slow(**OVER)
    hanging.add(BEN)
    state, _ = next_round(run.session, run.state)

    def spoil(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == BEN:
            reply.content = RecordDict()
        return [reply]

    run.grid.tamper = spoil
    hanging.clear()
    _, record = next_round(run.session, state)
    assert record.accepted == ("anna", "cleo", "dora")
    assert record.lost == {}
    (line,) = run.notices
    assert line.startswith("client ben: a late reply does not count: ")


def test_late_updates_are_added_in_the_order_of_their_names(open_slow: Callable) -> None:
    digests = []
    for order in ((2, 3), (3, 2)):
        run, hanging, _ = open_slow(**{"federation.cohort": 2, "federation.over-selection": 2.0})
        hanging.update(order)
        state, record = next_round(run.session, run.state)
        assert record.accepted == ("cleo", "dora")
        hanging.update({4, 5})
        for node in order:  # one after the other, before the next round begins
            hanging.remove(node)
            run.session.transport.node_ids()
        state, record = next_round(run.session, state)
        assert record.accepted == ("anna", "ben")
        digests.append(state.adapter.digest)
    assert digests[0] == digests[1]


def test_a_whole_run_with_late_updates_ends_well(make_config: Callable, tmp_path: Any) -> None:
    flat = {**BUFFERED, "federation.cohort": 2, "federation.over-selection": 2.0}
    config = make_config({**flat, "federation.num-rounds": 4, "run.output": str(tmp_path)})
    state = run_federation(config, local_grid(config, app, num_nodes=4))
    rounds = state.records[1:]
    assert [len(record.accepted) for record in rounds] == [2, 2, 2, 2]
    assert any(record.staleness for record in rounds)
    assert rounds[-1].mean_held_out < state.records[0].mean_held_out


def test_the_weight_falls_with_the_age() -> None:
    assert [staleness_weight(rounds) for rounds in range(3)] == pytest.approx([1, 2**-0.5, 3**-0.5])
