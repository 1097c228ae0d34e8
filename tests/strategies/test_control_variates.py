"""SCAFFOLD in a run: c is the mean of what the clients keep, whatever is lost, stopped or tampered with."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from safetensors.torch import load_file

from clients.client_app import app
from fedllm.adapters.layout import AdapterLayout
from fedllm.plan.run_plan import fixed_keys, resolve
from fedllm.runs.checkpoint import ServerState, load_checkpoint
from fedllm.runs.records import RoundRecord
from fedllm.wire import packets
from scripts.runtimes.local import local_grid
from strategies.rounds import next_round
from strategies.run import run_federation
from strategies.session import Watch

SCAFFOLD = {
    "train.control-variates": True,
    "aggregation.read-out": "factor-mean",
    "train.token-budget": 1,
    "federation.num-rounds": 3,
}
BEN = 3  # his node


@pytest.fixture
def run(make_config: Callable, tmp_path: Path) -> Callable[..., ServerState]:
    def do(name: str, hook: Callable[[RoundRecord], None] = lambda record: None, **flat: Any) -> ServerState:
        config = make_config({**SCAFFOLD, "run.output": str(tmp_path), "run.name": name, **flat})
        return run_federation(config, local_grid(config, app, num_nodes=4), Watch(record=hook))

    return do


def own_of(folder: Path, num_drawn: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return the c_i that each client goes on from, by the rows the server has counted."""
    (store,) = (folder / "private").iterdir()
    return {
        client: load_file(store / client / f"drawn-{number:012d}.safetensors")["control"]
        for client, number in num_drawn.items()
    }


def assert_mean(state: ServerState, folder: Path) -> None:
    own = own_of(folder, dict(state.num_drawn))
    assert state.control is not None
    assert float(state.control.vector.norm()) > 1e-3
    total = torch.stack(list(own.values())).double().sum(0)
    torch.testing.assert_close(4 * state.control.vector.double(), total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("payload", ["fp32", "bf16", "int8"])
def test_c_is_the_mean_of_the_clients_own(payload: str, run: Callable, tmp_path: Path) -> None:
    assert_mean(run("whole", **{"wire.codec": payload}), tmp_path / "whole")


def test_c_stays_the_mean_when_updates_are_lost(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    left = [2]

    def lose(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == BEN and reply.metadata.message_type == "train" and left[0]:
            left[0] -= 1
            reply.content = RecordDict()
        return [reply]

    flat = {**SCAFFOLD, "run.output": str(tmp_path), "federation.cohort": 3}
    opened = open_run(make_config(flat), tamper=lose)
    state = opened.state
    for _ in range(5):
        state, _ = next_round(opened.session, state)
        assert_mean(state, tmp_path / "run")
    assert left == [0]


def test_c_is_the_mean_of_more_clients_than_places(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    flat = {**SCAFFOLD, "run.output": str(tmp_path)}
    opened = open_run(make_config(flat))
    fewer = make_config({**flat, "federation.num-clients": 2, "federation.cohort": 2})
    plan = replace(resolve(fewer), digest=opened.session.plan.digest)
    object.__setattr__(opened.session, "plan", plan)
    clients, state, numbers = opened.session.clients, opened.state, []
    everybody = list(clients.items())
    for present in (everybody[:2], everybody[2:]):  # two go, and others take their places
        clients.clear()
        clients.update(present)
        for _ in range(3):
            state, _ = next_round(opened.session, state)
            own = own_of(tmp_path / "run", dict(state.num_drawn))
            assert state.control is not None
            total = torch.stack(list(own.values())).double().sum(0)
            torch.testing.assert_close(len(own) * state.control.vector.double(), total, rtol=1e-5, atol=1e-6)
            numbers.append(len(own))
    assert (numbers[0], numbers[-1]) == (2, 4)


def test_the_corrections_matter_from_the_second_round_on(run: Callable) -> None:
    flat = {"federation.num-rounds": 1}
    plain = {"train.control-variates": False}
    first = [run(name, **flat, **more).adapter.digest for name, more in (("a", {}), ("b", plain))]
    assert first[0] == first[1], "before the first round every c is zero"
    later = [run(name, **more).adapter.digest for name, more in (("c", {}), ("d", plain))]
    assert later[0] != later[1]


@pytest.mark.parametrize("stopped_in", [2, 3])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(stopped_in: int, run: Callable, tmp_path: Path) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round_num == stopped_in:  # the clients have changed their c_i, the server has not saved c
            raise KeyboardInterrupt

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop)
    resumed = run("stopped", **{"run.resume": True})
    assert resumed.adapter.digest == whole.adapter.digest
    assert resumed.control is not None
    assert whole.control is not None
    assert resumed.control.digest == whole.control.digest
    assert_mean(resumed, tmp_path / "stopped")


def test_c_is_in_the_checkpoint(run: Callable, make_config: Callable, tmp_path: Path) -> None:
    state = run("whole")
    config = make_config({**SCAFFOLD, "run.output": str(tmp_path), "run.name": "whole", "run.resume": True})
    saved, _ = load_checkpoint(tmp_path / "whole" / "checkpoints", fixed_keys(config), state.adapter.layout)
    assert saved.control is not None
    assert state.control is not None
    assert saved.control.digest == state.control.digest


def test_it_goes_with_a_personal_adapter(run: Callable, tmp_path: Path) -> None:
    state = run("both", **{"personal.mode": "dual", "evaluation.every": 1})
    assert_mean(state, tmp_path / "both")
    alone = run("alone")
    assert alone.adapter.digest == state.adapter.digest
    assert state.records[-1].personal_held_out != state.records[-1].held_out


def hostile(change: Callable[[torch.Tensor], torch.Tensor | None], layout: AdapterLayout) -> Callable:
    """Return what replaces Ben's change of his control variate, or takes it away."""

    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == BEN and reply.metadata.message_type == "train":
            data = reply.content["controls"]["ben"].data
            honest = packets.decode(data, layout_digest=layout.digest, part="control", size=layout.size)
            vector = change(honest)
            if vector is None:
                del reply.content["controls"]
            else:
                packet = packets.encode(
                    vector, layout_digest=layout.digest, part="control", round_num=1, payload="fp32"
                )
                array = Array("uint8", (len(packet),), packets.PACKET_TYPE, packet)
                reply.content["controls"] = ArrayRecord({"ben": array})
        return [reply]

    return tamper


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v * float("nan"), "not finite"),
        (lambda v: v * 1e6, "its control variate changed by"),
        (lambda v: torch.full_like(v, 1e30), "not finite|changed by"),
        (lambda v: None, "do not match"),
    ],
)
def test_a_bad_change_of_c_i_costs_its_sender_the_round(
    change: Callable, expected: str, make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    flat = {**SCAFFOLD, "run.output": str(tmp_path), "wire.codec": "fp32"}
    opened = open_run(make_config(flat))
    opened.grid.tamper = hostile(change, opened.session.layout)
    state, record = next_round(opened.session, opened.state)
    assert set(record.lost) == {"ben"}
    assert re.search(expected, record.lost["ben"])
    assert state.control is not None
    assert bool(torch.isfinite(state.control.vector).all())
    assert float(state.control.vector.norm()) <= 1.0
    assert_mean(state, tmp_path / "run")


def test_a_client_without_room_for_the_runs_rank_is_left_out(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    flat = {**SCAFFOLD, "run.output": str(tmp_path)}
    opened = open_run(make_config(flat), node_configs={BEN: {"max-rank": 1}})
    assert set(opened.session.clients) == {"anna", "cleo", "dora"}
    expected = (
        "client ben has room for rank 1 only, and train.control-variates needs the run's 2, and is left out"
    )
    assert expected in opened.notices
    _, record = next_round(opened.session, opened.state)
    assert record.accepted == ("anna", "cleo", "dora")
