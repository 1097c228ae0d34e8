"""Held-out losses that come with updates: the numbers of messages of their own, and no such message."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message

from clients.train import train_clients
from fedllm.config.run_config import RunConfig
from fedllm.errors import DivergedError, WithheldError
from fedllm.runs.checkpoint import ServerState
from strategies.first_state import first_state
from strategies.rounds import next_round
from tests.builders import train_request

IN_TRAINING = {"evaluation.every": "train", "federation.num-rounds": 2}
IN_MESSAGES = {**IN_TRAINING, "evaluation.every": 1}


def rounds(open_run: Callable, config: RunConfig, **kwargs: Any) -> tuple[ServerState, list[str]]:
    """Return the state after all rounds, and the types of the messages that were answered."""
    kinds: list[str] = []

    def hear(reply: Message) -> list[Message]:
        kinds.append(reply.metadata.message_type)
        return [reply]

    run = open_run(config, **{"tamper": hear, **kwargs})
    state = first_state(run.session)
    for _ in range(config.federation.num_rounds):
        state, _ = next_round(run.session, state)
    return state, kinds


@pytest.mark.parametrize(
    "flat", [{}, {"wire.node-sum": True, "aggregation.read-out": "factor-mean"}, {"personal.mode": "dual"}]
)
def test_losses_in_training_are_those_of_messages(
    flat: dict[str, Any], make_config: Callable, open_run: Callable
) -> None:
    own = {"run.name": f"in-training-{len(flat)}-{next(iter(flat), 'plain')}"}
    nodes = 1 if "wire.node-sum" in flat else 4
    state, kinds = rounds(open_run, make_config({**IN_TRAINING, **flat, **own}), num_nodes=nodes)
    other = {"run.name": own["run.name"] + "-not"}
    expected, _ = rounds(open_run, make_config({**IN_MESSAGES, **flat, **other}), num_nodes=nodes)
    assert state.adapter.digest == expected.adapter.digest
    for ours, theirs in zip(state.records, expected.records, strict=True):
        assert ours.held_out == pytest.approx(theirs.held_out, abs=0)
        assert ours.personal_held_out == pytest.approx(theirs.personal_held_out, abs=0)
    assert kinds.count("train") == 2 * nodes
    assert kinds.count("evaluate") == nodes  # after the last round alone
    assert kinds[-nodes:] == ["evaluate"] * nodes


def test_losses_come_from_the_cohort_of_the_next_round(make_config: Callable, open_run: Callable) -> None:
    state, _ = rounds(open_run, make_config({**IN_TRAINING, "federation.cohort": 2}))
    for before, after in zip(state.records[:-1], state.records[1:], strict=True):
        assert tuple(before.held_out) == after.asked


def test_a_loss_that_is_no_number_counts_as_none(make_config: Callable, open_run: Callable) -> None:
    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 2:
            reply.content.metric_records["metrics"]["held_out_loss"] = [math.nan]
        return [reply]

    state, _ = rounds(open_run, make_config(IN_TRAINING), tamper=tamper)
    assert state.records[0].not_finite == ("anna",)
    assert set(state.records[0].held_out) == {"ben", "cleo", "dora"}
    assert "anna" in state.records[1].accepted  # its update is sound


def test_a_run_ends_where_most_such_losses_are_no_numbers(make_config: Callable, open_run: Callable) -> None:
    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.message_type == "train":
            reply.content.metric_records["metrics"]["held_out_loss"] = [math.inf]
        return [reply]

    with pytest.raises(DivergedError, match="base model"):
        rounds(open_run, make_config(IN_TRAINING), tamper=tamper)


def test_losses_that_nobody_asked_for_are_refused(make_config: Callable, open_run: Callable) -> None:
    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 2:
            reply.content.metric_records["metrics"]["held_out_loss"] = [1.0]
        return [reply]

    state, _ = rounds(open_run, make_config({"federation.num-rounds": 1}), tamper=tamper)
    assert "columns" in state.records[1].lost["anna"]


def test_losses_are_withheld_in_training_too(make_config: Callable, open_run: Callable) -> None:
    pytest.importorskip("dp_accounting")
    private = {"privacy.epsilon": 8.0, "privacy.unit": "client", "run.name": "withheld-in-training"}
    run = open_run(make_config({**IN_TRAINING, **private}))
    assert not run.session.plan.measures_in_training
    holder = run.holder(2)
    with pytest.raises(WithheldError):  # whatever a server asks
        train_clients(holder, train_request(holder, "anna", evaluate=True, clip=1.0))
