"""Techniques at the server are collectors: what the round loop promises each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedllm.messages import ClientUpdate
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from strategies import rounds
from strategies.collectors import open_collectors
from strategies.exchange.requesting import begin_round
from strategies.rounds import run_round

NAMES = ("anna", "ben", "cleo", "dora")


@dataclass(eq=False)
class Counting:
    """A technique of a test: it notes what it is told and doubles the adapter."""

    seen: list[str] = field(default_factory=list)
    closed: list[tuple[ServerState, ServerState, RoundRecord]] = field(default_factory=list)

    def add(self, update: ClientUpdate) -> None:
        self.seen.append(update.client_id)

    def close(
        self, before: ServerState, after: ServerState, record: RoundRecord
    ) -> tuple[ServerState, RoundRecord]:
        self.closed.append((before, after, record))
        doubled = replace(after.adapter, vector=2 * after.adapter.vector)
        return replace(after, adapter=doubled), replace(record, adapter=doubled.digest)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Return a technique that every round has next to the run's own, as its last."""
    technique = Counting()
    monkeypatch.setattr(rounds, "open_collectors", lambda *round_of: (*open_collectors(*round_of), technique))
    return technique


def silence(*clients: int) -> Callable[[Message], list[Message]]:
    """Return how a grid loses what some nodes answer to train requests."""

    def lose(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id in clients and reply.metadata.message_type == "train":
            reply.content = RecordDict()
        return [reply]

    return lose


def test_a_collector_sees_updates_in_the_order_of_the_plan(
    counting: Counting, make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config(), tamper=silence(3))  # ben's node
    _, record = run_round(run.session, run.state)
    assert counting.seen == ["anna", "cleo", "dora"] == list(record.accepted)


def test_a_collector_closes_once_and_after_the_aggregate(
    counting: Counting, make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config())
    state, record = run_round(run.session, run.state)
    ((before, after, seen),) = counting.closed
    assert before is run.state
    assert (after.round_num, set(after.num_drawn)) == (1, set(NAMES))
    assert after.adapter.digest == seen.adapter != before.adapter.digest
    assert record.adapter == state.adapter.digest != seen.adapter


@pytest.mark.parametrize(
    ("flat", "number"),
    [
        ({}, 1),
        ({"train.control-variates": True, "aggregation.read-out": "factor-mean"}, 2),
        ({"distill.when": "every"}, 2),
        ({"distill.when": "last", "federation.num-rounds": 3}, 1),  # not due in round 1
        ({"privacy.epsilon": 8.0, "privacy.unit": "client", "privacy.trust": "local"}, 1),
    ],
)
def test_a_round_opens_the_techniques_its_plan_names(
    flat: dict[str, Any], number: int, make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config(flat))
    plan, _ = begin_round(run.session, run.state)
    assert len(open_collectors(run.session, run.state, plan)) == number


@pytest.mark.parametrize(
    "flat",
    [
        {},
        {"train.control-variates": True, "aggregation.read-out": "factor-mean"},
        {"distill.when": "every"},
    ],
)
def test_a_round_that_is_not_applied_changes_nothing(
    flat: dict[str, Any], make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config({**flat, "federation.min-clients": 4}), tamper=silence(3))
    state, record = run_round(run.session, run.state)
    assert not record.applied
    assert state is run.state
