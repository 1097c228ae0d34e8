"""Personal adapters in a run: they help their client, stay with it, and change nothing for anybody else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from safetensors.torch import load_file

from clients.client_app import app
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from scripts.console import loss_table
from scripts.runtimes.local import local_grid
from strategies.rounds import next_round
from strategies.run import run_federation
from strategies.session import Watch

DUAL = {"personal.mode": "dual:rank=3", "personal.steps": 6}
DITTO = {**DUAL, "personal.mode": "ditto:rank=3,pull=50"}
EVERYBODY = {"anna", "ben", "cleo", "dora"}


@pytest.fixture
def run(make_config: Callable, tmp_path: Path) -> Callable[..., tuple[ServerState, list[str]]]:
    """Return a function (name, hook on every record, number of nodes, **flat overrides) that does a run."""

    def do(
        name: str, hook: Callable[[RoundRecord], None] = lambda record: None, nodes: int = 4, **flat: Any
    ) -> Any:
        notices: list[str] = []
        fixed = {"run.output": str(tmp_path), "run.name": name, "federation.num-rounds": 3}
        config = make_config({**fixed, "train.token-budget": 1, "evaluation.every": 1, **flat})
        watch = Watch(notice=notices.append, record=hook)
        return run_federation(config, local_grid(config, app, num_nodes=nodes), watch), notices

    return do


def private_files(folder: Path) -> dict[str, bytes]:
    """Return the private state of a run folder by client and name, whatever the run is called."""
    (own,) = (folder / "private").iterdir()
    return {
        file.relative_to(own).as_posix(): file.read_bytes() for file in sorted(own.rglob("*.safetensors"))
    }


def personal_losses(state: ServerState) -> list[dict[str, float]]:
    return [dict(record.personal_held_out) for record in state.records]


def test_personal_adapters_leave_the_shared_one_as_it_is(run: Callable) -> None:
    plain, _ = run("plain")
    for name, flat in (("dual", DUAL), ("ditto", DITTO)):
        state, notices = run(name, **flat)
        assert notices == []
        assert state.adapter.digest == plain.adapter.digest
        assert [r.held_out for r in state.records] == [r.held_out for r in plain.records]
        assert [r.bytes_up for r in state.records] == [r.bytes_up for r in plain.records]


def test_it_lowers_its_clients_loss_and_a_pull_holds_it_back(run: Callable) -> None:
    dual, _ = run("dual", **DUAL)
    ditto, _ = run("ditto", **DITTO)
    for state in (dual, ditto):
        first, *later = state.records
        assert first.personal_held_out == first.held_out, "before its first round it has no effect"
        assert set(later[-1].personal_held_out) == EVERYBODY
    gains = [
        sum(
            state.records[-1].held_out[name] - state.records[-1].personal_held_out[name] for name in EVERYBODY
        )
        for state in (dual, ditto)
    ]
    assert gains[0] > 0.1
    assert gains[0] > gains[1]


@pytest.mark.parametrize("flat", [{"lora.client-ranks": "1,2"}, {"aggregation.preset": "ffa"}])
def test_it_is_trained_on_top_of_the_whole_shared_adapter(
    flat: dict[str, Any], run: Callable, tmp_path: Path
) -> None:
    run("whole", **DUAL, **{"federation.num-rounds": 1})
    run("partly", **DUAL, **flat, **{"federation.num-rounds": 1})
    assert private_files(tmp_path / "partly") == private_files(tmp_path / "whole")


def test_without_personal_adapters_nothing_is_kept_or_recorded(run: Callable, tmp_path: Path) -> None:
    state, _ = run("plain")
    assert not (tmp_path / "plain" / "private").exists()
    assert personal_losses(state) == [{}] * 4


def test_no_value_of_it_leaves_the_client(make_config: Callable, open_run: Callable, tmp_path: Path) -> None:
    replies: list[Message] = []

    def keep(reply: Message) -> list[Message]:
        replies.append(reply)
        return [reply]

    config = make_config({**DUAL, "run.output": str(tmp_path), "wire.codec": "fp32"})
    opened = open_run(config, tamper=keep)
    next_round(opened.session, opened.state)
    sent = b"".join(message_to_proto(reply).SerializeToString() for reply in replies)
    files = list((tmp_path / "run" / "private").rglob("*.safetensors"))
    assert {file.parent.name for file in files} == EVERYBODY
    for file in files:
        values = load_file(file)["personal"].numpy()
        for start in range(0, len(values) - 4, 4):
            if values[start : start + 4].any():
                assert values[start : start + 4].tobytes() not in sent
    trained = [reply.content for reply in replies if reply.metadata.message_type == "train"]
    assert len(trained) == 4
    assert all(list(content.array_records) == ["updates"] for content in trained)
    assert all(len(content["updates"]) == 1 for content in trained)


@pytest.mark.parametrize("stopped_in", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_a_stopped_run_goes_on_with_its_personal_adapters(
    stopped_in: int, run: Callable, tmp_path: Path
) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round_num == stopped_in:  # trained and kept by the clients, not saved by the server
            raise KeyboardInterrupt

    whole, _ = run("whole", **DUAL)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop, **DUAL)
    resumed, _ = run("stopped", **DUAL, **{"run.resume": True})
    assert personal_losses(resumed) == personal_losses(whole)
    assert private_files(tmp_path / "stopped") == private_files(tmp_path / "whole")


@pytest.mark.parametrize("nodes", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_it_does_not_matter_which_node_hosts_a_client(nodes: int, run: Callable, tmp_path: Path) -> None:
    apart, _ = run("apart", **DITTO)
    together, _ = run("together", nodes=nodes, **DITTO)
    assert personal_losses(together) == personal_losses(apart)
    assert private_files(tmp_path / "together") == private_files(tmp_path / "apart")


def test_a_lost_update_leaves_no_trace_in_the_personal_adapter(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    """Ben's first two updates are lost on the way: his personal adapter is that of his one good round."""
    left = [2]

    def lose(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == 3 and reply.metadata.message_type == "train" and left[0]:
            left[0] -= 1
            reply.content = RecordDict()
        return [reply]

    flat = {**DUAL, "train.token-budget": 1, "run.output": str(tmp_path)}
    lossy = open_run(make_config({**flat, "run.name": "lossy"}), tamper=lose)
    state = lossy.state
    for _ in range(3):
        state, record = next_round(lossy.session, state)
    assert state.num_drawn["ben"] == 4
    (file,) = (file for file in private_files(tmp_path / "lossy") if file.startswith("ben"))
    assert file == "ben/drawn-000000000004.safetensors"
    assert record.accepted == ("anna", "ben", "cleo", "dora")


def test_a_damaged_personal_adapter_is_named_and_made_afresh(
    run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def damage(record: RoundRecord) -> None:
        if record.round_num == 2:
            (file,) = (tmp_path / "hurt" / "private").rglob("ben/drawn-000000000008.safetensors")
            file.write_bytes(file.read_bytes()[:100])

    whole, _ = run("whole", **DUAL)
    caplog.clear()
    hurt, _ = run("hurt", damage, **DUAL)
    assert [line for line in caplog.messages if "ben" in line and "starts afresh" in line]
    assert hurt.adapter.digest == whole.adapter.digest
    others = EVERYBODY - {"ben"}
    last, expected = hurt.records[-1].personal_held_out, whole.records[-1].personal_held_out
    assert {name: last[name] for name in others} == {name: expected[name] for name in others}
    assert last["ben"] != expected["ben"]


def test_the_result_has_mean_worst_and_spread_of_both(run: Callable, tmp_path: Path) -> None:
    state, _ = run("dual", **DUAL)
    after = json.loads((tmp_path / "dual" / "result.json").read_text())["held_out"]["after"]
    record = state.records[-1]
    for found, losses in ((after, record.held_out), (after["personal"], record.personal_held_out)):
        assert found["clients"] == dict(losses)
        assert found["worst"] == max(losses.values()) == losses[found["worst_client"]]
        assert found["spread"] == max(losses.values()) - min(losses.values())
        assert found["deviation"] > 0


def test_the_table_shows_every_client_and_each_spread() -> None:
    columns = {
        "base": {"a": 3.0, "b": 5.0},
        "adapter": {"a": 2.0, "b": 4.0},
        "+ personal": {"a": 2.0, "b": 3.0},
    }
    table = loss_table(columns)
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns] == ["client", *columns, "change"]
    assert cells[0] == ["a", "b", "mean", "worst", "worst - best", "deviation"]
    assert cells[3] == ["2.000", "3.000", "2.500", "3.000", "1.000", "0.500"]
    assert cells[4] == ["-1.000", "-2.000", "-1.500", "-2.000", "-1.000", "-0.500"]
    without = loss_table({**columns, "+ personal": {}})
    assert [column.header for column in without.columns] == ["client", "base", "adapter", "change"]
