"""The server's log of a run: every answer and decision, one chain over all attempts."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from clients.client_app import app
from fedllm.adapters.folder import WEIGHTS
from fedllm.chained_log import read_entries, verify
from fedllm.errors import CheckpointError, RunFailedError
from fedllm.runs.checkpoint import ServerState
from fedllm.wire.digests import content_digest
from scripts.runtimes.local import local_grid
from strategies.run import run_federation
from strategies.session import Watch


@pytest.fixture
def run(make_config: Callable, watched_grid: type, tmp_path: Path) -> Callable[..., ServerState]:
    """Return a function (tamper, hook on every record, **flat overrides) that does a run of two rounds."""

    def do(
        tamper: Callable = lambda reply: [reply], hook: Callable = lambda record: None, **flat: Any
    ) -> ServerState:
        own = {"run.output": str(tmp_path), "run.name": "logged", "federation.num-rounds": 2}
        config = make_config({**own, **flat})
        grid = watched_grid(app, local_grid(config, app, num_nodes=4).contexts)
        grid.tamper = tamper
        return run_federation(config, grid, Watch(record=hook))

    return do


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logged" / "decisions.jsonl"


def of(log: Path, event: str) -> list[dict[str, Any]]:
    return [entry for entry in read_entries(log) if entry["event"] == event]


def test_a_run_logs_every_answer_and_decision(run: Callable, log: Path) -> None:
    sent: list[str] = []

    def note(reply: Message) -> list[Message]:
        sent.append(content_digest(reply.content))
        return [reply]

    state = run(note)
    verify(log)
    assert log.stat().st_mode & 0o777 == 0o600
    assert [entry["answer"] for entry in of(log, "reply")] == sent
    assert {entry["kind"] for entry in of(log, "reply")} == {"query.join", "train", "evaluate"}
    assert sorted(entry["client"] for entry in of(log, "joined")) == ["anna", "ben", "cleo", "dora"]
    accepted = [(entry["round"], entry["client"]) for entry in of(log, "accepted")]
    assert sorted(accepted) == [(n, name) for n in (1, 2) for name in ("anna", "ben", "cleo", "dora")]
    assert all(len(entry["delta"]) == 64 for entry in of(log, "accepted"))
    assert [entry["round"] for entry in of(log, "round")] == [0, 1, 2]
    assert [entry["round"] for entry in of(log, "checkpoint")] == [1, 2]
    last = list(read_entries(log))[-1]
    manifest = json.loads((log.parent / "adapter" / "manifest.json").read_text())
    assert of(log, "checkpoint")[-1]["adapter"] == state.adapter.digest
    assert (last["event"], last["weights"]) == ("published", manifest["sha256"][WEIGHTS])


def test_a_client_that_joins_later_is_logged_too(
    make_config: Callable, watched_grid: type, tmp_path: Path, log: Path
) -> None:
    config = make_config({"run.output": str(tmp_path), "run.name": "logged", "federation.num-rounds": 2})
    grid = watched_grid(app, local_grid(config, app, num_nodes=4).contexts)
    late = grid.contexts.pop(3)
    run_federation(config, grid, Watch(record=lambda record: grid.contexts.update({3: late})))
    assert [entry["client"] for entry in of(log, "joined")] == ["anna", "cleo", "dora", "ben"]
    assert of(log, "joined")[-1]["node"] == 3


def test_the_chain_outlives_a_kill_and_a_torn_line(run: Callable, log: Path) -> None:
    def kill(record: Any) -> None:
        if record.round_num == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(hook=kill)
    head = verify(log).head
    with log.open("ab") as file:
        file.write(b'{"time": "2026')  # what a power cut leaves
    run(**{"run.resume": True})
    verify(log, head)
    assert len(of(log, "begun")) == 2
    assert [entry["round"] for entry in of(log, "round")] == [0, 1, 2, 2]


def test_a_refused_update_is_logged_with_its_reason(run: Callable, log: Path) -> None:
    def spoil(reply: Message) -> list[Message]:
        if "anna" in reply.content.array_records.get("updates", {}):
            metrics = reply.content["metrics"]
            assert isinstance(metrics, MetricRecord)
            metrics["train_loss"] = [float("nan")] * len(metrics["train_loss"])
        return [reply]

    run(spoil, **{"federation.num-rounds": 1})
    (refused,) = of(log, "refused")
    assert (refused["client"], refused["round"]) == ("anna", 1)
    assert refused["reason"]
    assert sorted(entry["client"] for entry in of(log, "accepted")) == ["ben", "cleo", "dora"]


def test_a_run_that_fails_logs_why(run: Callable, log: Path) -> None:
    with pytest.raises(RunFailedError) as caught:
        run(**{"federation.num-clients": 5, "federation.min-clients": 5})
    assert list(read_entries(log))[-1]["reason"] == str(caught.value)
    verify(log)


def test_a_run_whose_folder_cannot_be_written_logs_why(run: Callable, log: Path) -> None:
    def full(record: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        run(hook=full)
    last = list(read_entries(log))[-1]
    assert (last["event"], "No space left" in last["reason"]) == ("failed", True)


def test_a_digest_depends_on_all_that_a_message_holds() -> None:
    def message(order: int, **changed: object) -> RecordDict:
        values: Mapping[str, Any] = {"loss": [0.5, 0.25], "count": 3, **changed}
        records = {
            "numbers": MetricRecord(values),
            "more": MetricRecord({"one": 1}),
        }
        return RecordDict(dict(list(records.items())[::order]))

    assert content_digest(message(1)) == content_digest(message(-1))
    assert content_digest(message(1)) != content_digest(message(1, count=4))
    assert content_digest(message(1)) != content_digest(message(1, loss=[0.25, 0.5]))
    arrays = [Array("uint8", (3,), "own", data) for data in (b"abc", b"abd")]
    digests = {content_digest(RecordDict({"arrays": ArrayRecord({"packet": array})})) for array in arrays}
    assert len(digests) == 2
