"""Rounds on a base model that has a base delta: who holds what, what is sent, and that all have the same
bits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.adapters.base_delta import BaseDelta
from fedllm.adapters.layout import AdapterLayout
from fedllm.messages import ClientUpdate
from fedllm.models.with_base_delta import with_base_delta
from fedllm.wire import packets
from strategies.exchange.evaluation import evaluate
from strategies.rounds import next_round, run_round

pytestmark = pytest.mark.usefixtures("own_base_deltas")

NAMES = ("anna", "ben", "cleo", "dora")


def forget_everything(run: Any) -> None:
    """Do what the loss of a machine's disk does."""
    store = run.process.base_deltas
    store.newest = None
    for file in store.folder.glob("*"):
        file.unlink()


def base_delta_on(layout: AdapterLayout, seed: int = 0) -> BaseDelta:
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for place, matrix in enumerate(layout.matrices):
        rank = place % 3
        b_ON = 0.2 * torch.randn(matrix.out_features, rank, generator=generator)
        pairs.append((b_ON, torch.randn(rank, matrix.in_features, generator=generator)))
    return BaseDelta(layout, tuple(pairs))


def packet_size(layout: AdapterLayout, base_delta: BaseDelta, payload: str = "fp32") -> tuple[int, int]:
    """Return the bytes of an adapter's packet and of a base delta's."""
    sizes = [
        len(
            packets.encode(
                torch.zeros(size), layout_digest=layout.digest, part=part, round_num=1, payload=payload
            )
        )
        for size, part in ((layout.size, "both"), (base_delta.size, "base-delta"))
    ]
    return sizes[0], sizes[1]


def on_base_delta(run: Any, seed: int = 0) -> Any:
    """Return the run's state with a base delta, as a read-out that base deltas leaves it."""
    return replace(run.state, base_delta=base_delta_on(run.session.layout, seed))


def test_a_base_delta_is_sent_to_a_node_once_per_change(make_config: Callable, open_run: Callable) -> None:
    config = make_config({"federation.num-rounds": 9, "data.max-held-out": 2, "data.held-out-fraction": 0.4})
    run = open_run(config)
    state = on_base_delta(run)
    adapter, base_delta = packet_size(run.session.layout, state.base_delta)
    expected = [adapter + base_delta, adapter, adapter + base_delta, adapter]
    for number, size in enumerate(expected):
        if number == 2:
            state = replace(state, base_delta=base_delta_on(run.session.layout, 1))
        digest = state.base_delta.digest
        state, record = next_round(run.session, state)
        assert record.accepted == NAMES
        assert record.bytes_down == 4 * size
        assert state.base_delta.digest == digest
        before = run.session.transport.bytes_down
        evaluate(run.session, state)
        assert run.session.transport.bytes_down - before == 4 * adapter, (
            "evaluation needs no base delta again"
        )


def test_an_evaluation_brings_the_next_rounds_base_delta(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config({"data.max-held-out": 2, "data.held-out-fraction": 0.4}))
    state = on_base_delta(run)
    adapter, base_delta = packet_size(run.session.layout, state.base_delta)
    assert set(evaluate(run.session, state).shared) == set(NAMES)
    assert run.session.transport.bytes_down == 4 * (adapter + base_delta)
    _, record = next_round(run.session, state)
    assert record.bytes_down == 4 * adapter


def test_a_base_delta_is_used_and_leaves_the_base_as_it_was(
    make_config: Callable, open_run: Callable
) -> None:
    config = make_config({"data.max-held-out": 2, "data.held-out-fraction": 0.4})
    run = open_run(config)
    base = run.session.resident.base(config.model)
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    plain, _ = next_round(run.session, run.state)
    moved, record = next_round(run.session, on_base_delta(run))
    assert record.accepted == NAMES
    assert plain.adapter.digest != moved.adapter.digest
    losses_with_base_delta = evaluate(run.session, on_base_delta(run)).shared
    plain_losses = evaluate(run.session, run.state).shared
    for name in NAMES:
        assert abs(losses_with_base_delta[name] - plain_losses[name]) > 1e-4
    after = base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_a_client_that_joins_late_trains_on_the_same_base_bits(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node appears in round 3 with nothing, is sent the whole base delta, and gives its usual delta."""
    config = make_config({"federation.num-rounds": 9, "wire.codec": "fp32", "federation.min-clients": 3})
    run = open_run(config)
    late = run.grid.contexts.pop(5)
    run.session.clients.pop("dora")
    run.session.transport.asked.pop(5)
    state = on_base_delta(run)
    for seed in (1, 2):
        state, record = next_round(run.session, state)
        assert record.accepted == NAMES[:3]
        state = replace(state, base_delta=base_delta_on(run.session.layout, seed))
    forget_everything(run)  # what dora's machine has; the others are sent it anew, as it is a new base delta
    run.grid.contexts[5] = late
    seen: dict[str, ClientUpdate] = {}
    watch = replace(run.session.watch, client=lambda number, answer: seen.update({answer.client_id: answer}))
    bases = []

    def spied(base: Any, base_delta: BaseDelta) -> Any:
        weight = base.model.get_submodule(run.session.layout.matrices[1].module).weight
        block = with_base_delta(base, base_delta)
        with block:
            bases.append(weight.detach().clone())
        return with_base_delta(base, base_delta)

    monkeypatch.setattr("clients.train.with_base_delta", spied)
    _, record = next_round(replace(run.session, watch=watch), state)
    assert record.accepted == NAMES
    adapter, base_delta = packet_size(run.session.layout, state.base_delta)
    assert record.bytes_down == 4 * (adapter + base_delta)
    assert len(bases) == 4
    assert all(torch.equal(base, bases[0]) for base in bases)

    everybody = open_run(config)
    again: dict[str, ClientUpdate] = {}
    watch = replace(
        everybody.session.watch, client=lambda number, answer: again.update({answer.client_id: answer})
    )
    next_round(replace(everybody.session, watch=watch), state)
    for name in NAMES:
        assert torch.equal(seen[name].delta, again[name].delta)


def test_a_node_that_lost_the_base_delta_is_sent_it_again(make_config: Callable, open_run: Callable) -> None:
    config = make_config({"federation.num-rounds": 9, "federation.min-clients": 4})
    run = open_run(config)
    state, _ = next_round(run.session, on_base_delta(run))
    adapter, base_delta = packet_size(run.session.layout, state.base_delta)
    forget_everything(run)
    run.records.clear()
    next_round(run.session, state)
    first, second = run.records
    assert set(first.lost.values()) == {"client reports not-held"}
    assert (first.applied, first.bytes_down) == (False, 4 * adapter)
    assert (second.accepted, second.bytes_down) == (NAMES, 4 * (adapter + base_delta))


@pytest.mark.parametrize("reply", ["none", "error"])
def test_a_node_that_did_not_answer_is_sent_the_base_delta_again(
    reply: str, make_config: Callable, open_run: Callable
) -> None:
    broken = [True]

    def tamper(message: Message) -> list[Message]:
        if message.metadata.src_node_id == 3 and message.metadata.message_type == "train" and broken[0]:
            broken[0] = False
            if reply == "none":
                return []
            message.content = RecordDict({"error": ConfigRecord({"code": "out-of-memory"})})
        return [message]

    config = make_config({"federation.num-rounds": 9, "federation.round-deadline": 2.0})
    run = open_run(config, tamper=tamper)
    state, record = next_round(run.session, on_base_delta(run))
    assert list(record.lost) == ["ben"]
    adapter, base_delta = packet_size(run.session.layout, state.base_delta)
    run.session.transport.late.clear()
    state, record = next_round(run.session, state)
    assert record.accepted == NAMES
    assert record.bytes_down == 4 * adapter + base_delta


def test_a_wrong_digest_of_a_base_delta_is_refused(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config({"federation.max-retries": 0}))
    state = on_base_delta(run)
    forged = base_delta_on(run.session.layout, 5)
    forged.__dict__["digest"] = "0" * 64
    _, record = next_round(run.session, state)
    assert record.accepted == NAMES
    _, record = run_round(run.session, replace(state, base_delta=forged))
    assert set(record.lost.values()) == {"client reports bad-packet"}
