"""FedSA-LoRA: each client's B lies in its private store, and is where its next round and evaluation start."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from safetensors.torch import load_file

from clients.client_app import app
from clients.evaluate import evaluate_clients
from clients.jobs import make_job
from clients.techniques import plan_node_round
from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.adapters.parts import part_of, part_size, whole_of
from fedllm.engine.jobs import EvaluationJob
from fedllm.messages import ClientUpdate
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from fedllm.wire import packets
from scripts.runtimes.local import local_grid
from strategies.cohort.plan_round import plan_round
from strategies.exchange.evaluation import evaluate
from strategies.rounds import next_round
from strategies.run import run_federation
from strategies.session import Watch
from tests.builders import evaluate_request, train_request

FEDSA = {"aggregation.preset": "fedsa", "wire.codec": "fp32", "train.token-budget": 1}
NAMES = ("anna", "ben", "cleo", "dora")


def kept_b(folder: Path, client: str, num_drawn: int) -> torch.Tensor:
    (file,) = (folder / "private").rglob(f"{client}/drawn-{num_drawn:012d}.safetensors")
    return load_file(file)["local-b"]


@pytest.mark.parametrize("ranks", ["", "1,2"])
def test_a_round_goes_on_from_the_shared_a_and_the_last_b(
    ranks: str, make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    run = open_run(make_config({**FEDSA, "run.output": str(tmp_path), "lora.client-ranks": ranks}))
    layout, heard = run.session.layout, {}

    def hear(round_num: int, answer: Any) -> None:
        assert isinstance(answer, ClientUpdate)
        heard[round_num, answer.client_id] = answer

    object.__setattr__(run.session, "watch", Watch(client=hear))
    first, _ = next_round(run.session, run.state)
    plan = plan_round(run.session, first, 1)
    next_round(run.session, first)
    for node, name in enumerate(NAMES, 2):
        holder = run.holder(node)
        own_b = kept_b(tmp_path / "run", name, 4)
        assert float(own_b.abs().max()) > 0.01
        rank = plan.ranks[name]
        request = train_request(
            holder,
            name,
            round_num=2,
            drawn={name: 4},
            ranks={name: rank},
            adapter=first.adapter,
            base_delta=first.base_delta,
        )
        start_P = whole_of(layout, own_b, "b", first.adapter.vector)
        this_round = plan_node_round(holder, request)
        job = make_job(this_round, holder.clients[name], 4, rank=rank, start_P=start_P)
        (alone,) = holder.engine.train([job])
        update = heard[2, name]
        own_layout = job.layout
        assert torch.equal(part_of(own_layout, update.delta, "a"), part_of(own_layout, alone.delta, "a"))
        assert not bool(part_of(own_layout, update.delta, "b").any())
        after = part_of(own_layout, job.start + alone.delta, "b")
        if plan.ranks[name] == layout.rank:
            assert torch.equal(kept_b(tmp_path / "run", name, 8), after)


def test_a_client_is_evaluated_with_its_own_b(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    run = open_run(make_config({**FEDSA, "run.output": str(tmp_path)}))
    state, _ = next_round(run.session, run.state)
    layout, found = run.session.layout, evaluate(run.session, state)
    assert found.personal == {}
    for node, name in enumerate(NAMES, 2):
        holder = run.holder(node)
        vector = whole_of(layout, kept_b(tmp_path / "run", name, 4), "b", state.adapter.vector)
        (alone,) = holder.engine.evaluate([EvaluationJob(name, vector, holder.clients[name].held_out)])
        assert found.shared[name] == alone.loss
        # a client that has drawn nothing has kept nothing: it is measured with the server's B
        request = evaluate_request(holder, name, adapter=state.adapter, base_delta=state.base_delta)
        (shared,) = evaluate_clients(holder, request)
        assert shared.loss != alone.loss


def test_a_client_that_never_trained_has_the_first_b(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config(FEDSA))
    fresh = evaluate(run.session, run.state)
    other = replace(run.state, adapter=AdapterState(run.session.layout, run.state.adapter.vector.clone()))
    assert evaluate(run.session, other) == fresh


@pytest.mark.parametrize("stopped_in", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_a_run_that_was_stopped_goes_on_with_every_clients_b(
    stopped_in: int, make_config: Callable, tmp_path: Path
) -> None:
    def run(name: str, hook: Callable[[RoundRecord], None] = lambda record: None, **flat: Any) -> ServerState:
        fixed = {"run.output": str(tmp_path), "run.name": name, "federation.num-rounds": 3}
        config = make_config({**FEDSA, **fixed, **flat})
        return run_federation(config, local_grid(config, app, num_nodes=4), Watch(record=hook))

    def stop(record: RoundRecord) -> None:
        if record.round_num == stopped_in:
            raise KeyboardInterrupt

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop)
    resumed = run("stopped", **{"run.resume": True})
    assert resumed.adapter.digest == whole.adapter.digest
    assert resumed.records[-1].held_out == whole.records[-1].held_out
    for name in NAMES:
        found, expected = (kept_b(tmp_path / folder, name, 12) for folder in ("stopped", "whole"))
        assert torch.equal(found, expected)


def test_b_never_leaves_and_what_travels_is_an_a(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    replies: list[Message] = []

    def keep(reply: Message) -> list[Message]:
        replies.append(reply)
        return [reply]

    opened = open_run(make_config({**FEDSA, "run.output": str(tmp_path)}), tamper=keep)
    state = opened.state
    layout = opened.session.layout
    for number in (1, 2):
        state, record = next_round(opened.session, state)
        assert record.accepted == NAMES
        packet = packets.encode(
            torch.zeros(part_size(layout, "a")),
            layout_digest=layout.digest,
            part="a",
            round_num=number,
            payload="fp32",
        )
        assert record.bytes_up == 4 * len(packet)
    assert not bool(part_of(layout, state.adapter.vector, "b").any())
    own = [kept_b(tmp_path / "run", name, 8) for name in NAMES]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(own, 2))
    sent = b"".join(message_to_proto(reply).SerializeToString() for reply in replies)
    for values in own:
        raw = values.numpy()
        for start in range(0, len(raw) - 4, 4):
            if raw[start : start + 4].any():
                assert raw[start : start + 4].tobytes() not in sent


def test_a_client_of_a_smaller_rank_keeps_a_smaller_b(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    flat = {**FEDSA, "run.output": str(tmp_path), "lora.client-ranks": "1,2"}
    opened = open_run(make_config(flat))
    layout: AdapterLayout = opened.session.layout
    state = opened.state
    for _ in range(2):
        state, record = next_round(opened.session, state)
        assert record.accepted == NAMES
    for name in NAMES:
        whole = whole_of(layout, kept_b(tmp_path / "run", name, 8), "b")
        lasting = [bool(b_OR[:, 1].any()) for _, b_OR in layout.factors(whole)]
        assert lasting == [name in ("ben", "dora")] * len(layout.matrices)


def test_a_lost_update_leaves_no_trace_in_its_clients_b(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    left = [1]

    def lose(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == 3 and reply.metadata.message_type == "train" and left[0]:
            left[0] -= 1
            reply.content = RecordDict()
        return [reply]

    lossy = open_run(make_config({**FEDSA, "run.output": str(tmp_path)}), tamper=lose)
    state, record = next_round(lossy.session, lossy.state)
    assert "ben" in record.lost
    state, record = next_round(lossy.session, state)
    assert state.num_drawn == {"anna": 8, "ben": 4, "cleo": 8, "dora": 8}
    (store,) = (tmp_path / "run" / "private").iterdir()
    assert [file.name for file in (store / "ben").iterdir()] == ["drawn-000000000004.safetensors"]
