"""Rounds in which one factor is trained, ranks differ, or B stays with its client: bits and bytes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from clients.jobs import make_job
from clients.process import Process
from clients.techniques import plan_node_round
from fedllm.adapters.layout import AdapterState, at_rank, initial_adapter, with_rank
from fedllm.adapters.parts import other_part, part_of, part_size
from fedllm.errors import ConfigError
from fedllm.messages import ClientUpdate
from fedllm.wire import packets
from strategies.exchange.evaluation import evaluate
from strategies.rounds import next_round
from tests.builders import train_request

FFA = {"aggregation.train": "b", "aggregation.read-out": "factor-mean", "wire.codec": "fp32"}
NAMES = ("anna", "ben", "cleo", "dora")


def packet_size(layout: Any, part: str, payload: str = "fp32", round_num: int = 1) -> int:
    """Return the bytes of one packet of a part."""
    vector = torch.zeros(part_size(layout, part))
    return len(
        packets.encode(vector, layout_digest=layout.digest, part=part, round_num=round_num, payload=payload)
    )


def answers_of(run: Any) -> dict[str, ClientUpdate]:
    """Return where the updates of the next rounds will be put as the server accepts them."""
    seen: dict[str, ClientUpdate] = {}
    watch = replace(run.session.watch, client=lambda number, answer: seen.update({answer.client_id: answer}))
    run.session = replace(run.session, watch=watch)
    return seen


@pytest.mark.parametrize("payload", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("init_a", ["kaiming", "orthonormal"])
def test_ffa_sends_b_alone_and_a_keeps_the_bits_of_the_seed(
    payload: str, init_a: str, make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config({**FFA, "wire.codec": payload, "lora.init-a": init_a}))
    state, layout = run.state, run.session.layout
    for number in (1, 2):
        state, record = next_round(run.session, state)
        assert record.accepted == NAMES
        assert record.training.trained == "b"
        assert record.bytes_up == 4 * packet_size(layout, "b", payload)
        assert record.bytes_down == 4 * packet_size(layout, "b")
        seed = initial_adapter(layout, 0, init_a).vector
        assert torch.equal(part_of(layout, state.adapter.vector, "a"), part_of(layout, seed, "a"))
        assert int(part_of(layout, state.adapter.vector, "b").count_nonzero()) > 0, number


def test_leaving_a_out_changes_no_bit(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for whole in (False, True):
        run = open_run(make_config(FFA))
        if whole:
            monkeypatch.setattr("strategies.exchange.requesting.part_to_send", lambda *_: "both")
        state = run.state
        for _ in range(2):
            state, record = next_round(run.session, state)
        assert (record.bytes_down > 4 * packet_size(run.session.layout, "b")) == whole
        digests.append(state.adapter.digest)
    assert digests[0] == digests[1]


def test_an_adapter_that_the_seed_does_not_give_travels_whole(
    make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config(FFA))
    layout = run.session.layout
    state = replace(run.state, adapter=initial_adapter(layout, 7))
    after, record = next_round(run.session, state)
    assert record.accepted == NAMES
    assert record.bytes_down == 4 * packet_size(layout, "both")
    assert torch.equal(part_of(layout, after.adapter.vector, "a"), part_of(layout, state.adapter.vector, "a"))


def test_a_machine_with_other_bits_is_sent_all_the_next_time(
    make_config: Callable, open_run: Callable
) -> None:
    run, honest = open_run(make_config(FFA)), open_run(make_config(FFA))
    holder = run.holder(3)
    layout = run.session.layout
    own = holder.__dict__.get("initial")
    holder.__dict__["initial"] = initial_adapter(layout, 5)  # as a machine with another generator has it
    try:
        state, record = next_round(run.session, run.state)
        assert record.lost == {"ben": "client reports not-held"}
        state, record = next_round(run.session, state)
        assert record.accepted == NAMES
        assert record.bytes_down == 3 * packet_size(layout, "b") + packet_size(layout, "both")
        assert set(evaluate(run.session, state).shared) <= set(NAMES)
    finally:
        holder.__dict__.pop("initial")
        if own is not None:
            holder.__dict__["initial"] = own
    _, record = next_round(honest.session, honest.state)
    assert record.accepted == NAMES


def test_alternate_moves_one_factor_a_round_and_no_other_bit(
    make_config: Callable, open_run: Callable
) -> None:
    config = make_config({**FFA, "aggregation.train": "alternate", "train.weight-decay": 0.1})
    config = config.override({"federation.num-rounds": 9})  # the last round is evaluated, which takes bytes
    run = open_run(config)
    state, layout = run.state, run.session.layout
    for trained in ("b", "a", "b"):
        after, record = next_round(run.session, state)
        assert record.training.trained == trained
        assert record.bytes_up == 4 * packet_size(layout, trained)
        assert record.bytes_down == 4 * packet_size(layout, "both")
        moved = [
            not torch.equal(
                part_of(layout, after.adapter.vector, part), part_of(layout, state.adapter.vector, part)
            )
            for part in (trained, other_part(trained))
        ]
        assert moved == [True, False]
        assert record.aggregation.rho == pytest.approx(0.0, abs=1e-6)
        state = after


@pytest.mark.parametrize("train", ["both", "b"])
def test_clients_train_and_send_at_their_own_ranks(
    train: str, make_config: Callable, open_run: Callable
) -> None:
    """Dealt in turn over sorted ids, and dora's machine has room for rank 1 only."""
    read_out = "svd" if train == "both" else "factor-mean"
    flat = {**FFA, "aggregation.train": train, "aggregation.read-out": read_out}
    config = make_config({**flat, "lora.rank": 3, "lora.client-ranks": "3,2"})
    run = open_run(config, node_configs={5: {"max-rank": 1}})
    seen = answers_of(run)
    assert run.session.clients["dora"].max_rank == 1
    state, record = next_round(run.session, run.state)
    assert record.accepted == NAMES
    expected = {"anna": 3, "ben": 2, "cleo": 3, "dora": 1}
    layout = run.session.layout
    assert {name: update.rank for name, update in seen.items()} == expected
    assert record.bytes_up == sum(packet_size(at_rank(layout, rank), train) for rank in expected.values())
    for name, rank in expected.items():
        holder = run.holder(run.session.clients[name].node_id)
        own = at_rank(layout, rank)
        assert own.scale == pytest.approx(layout.scale)
        start_P = run.state.adapter.vector
        request = train_request(holder, name, ranks={name: rank}, adapter=run.state.adapter)
        job = make_job(plan_node_round(holder, request), holder.clients[name], 0, rank=rank, start_P=start_P)
        assert torch.equal(job.start, with_rank(run.state.adapter.vector, layout, rank))
        (alone,) = holder.engine.train([job])
        assert torch.equal(alone.delta, seen[name].delta)
    assert set(evaluate(run.session, state).shared) <= set(NAMES)


def test_ranks_by_name_leave_others_alone_and_name_the_unknown(
    make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config({"lora.client-ranks": "ben:1,zoe:1"}))
    assert run.session.ranks() == {"anna": 2, "ben": 1, "cleo": 2, "dora": 2}
    assert "lora.client-ranks names client zoe, which has not joined" in run.notices


@pytest.mark.parametrize("limit", [-1, 1.5, "4", True])
def test_a_limit_that_is_no_rank_is_refused_by_its_node(limit: Any, make_config: Callable) -> None:
    node = {"partition-id": 0, "num-partitions": 4, "server-paths": True, "max-rank": limit}
    with pytest.raises(ConfigError, match=f"max-rank = {limit!r}"):
        Process().open(make_config().to_flat(), node)


def test_a_node_refuses_a_rank_above_its_own_limit(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config(), node_configs={3: {"max-rank": 1}})
    run.session.clients["ben"] = replace(
        run.session.clients["ben"], max_rank=0
    )  # a server that does not heed it
    _, record = next_round(run.session, run.state)
    assert record.accepted == ("anna", "cleo", "dora")
    assert dict(record.codes) == {"ben": "bad-config"}


def test_with_a_local_b_a_alone_travels(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config({"aggregation.read-out": "local-b", "wire.codec": "fp32"}))
    layout, seen = run.session.layout, answers_of(run)
    state = run.state
    for _ in range(2):
        before = state.adapter
        state, record = next_round(run.session, state)
        assert record.accepted == NAMES
        assert record.training.trained == "both"
        assert record.bytes_up == 4 * packet_size(layout, "a")
        assert record.bytes_down == 4 * packet_size(layout, "a")
        for update in seen.values():
            assert int(part_of(layout, update.delta, "b").count_nonzero()) == 0
            assert int(part_of(layout, update.delta, "a").count_nonzero()) > 0
        assert torch.equal(part_of(layout, state.adapter.vector, "b"), torch.zeros(part_size(layout, "b")))
        assert state.adapter.digest != before.digest
    losses = evaluate(run.session, state).shared
    assert all(loss > 0 for loss in losses.values())


def test_a_first_adapter_with_a_b_of_its_own_travels_whole(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config({"aggregation.read-out": "local-b", "wire.codec": "fp32"}))
    layout = run.session.layout
    state = replace(run.state, adapter=AdapterState(layout, torch.full((layout.size,), 0.1)))
    _, record = next_round(run.session, state)
    assert record.bytes_down == 4 * packet_size(layout, "both")
    assert record.bytes_up == 4 * packet_size(layout, "a")
