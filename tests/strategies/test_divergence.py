"""A run whose numbers are not finite is no result, and one that made things worse says so."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from clients.client_app import app
from fedllm.errors import DivergedError
from fedllm.messages import ClientFailure
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from fedllm.wire import replies
from scripts.runtimes import local
from strategies.divergence import is_finite
from strategies.first_state import first_state
from strategies.rounds import next_round
from strategies.run import run_federation
from strategies.session import Watch

Loss = Callable[[int, int, float], float]  # (node, evaluation of that node from 0, its loss) -> what it says

TOO_FAST = {"train.learning-rate": 1e30, "federation.num-rounds": 2}


def saying(loss: Loss) -> Callable[[Message], list[Message]]:
    """Return what changes the held-out losses that nodes report."""
    counts: dict[int, int] = {}

    def tamper(reply: Message) -> list[Message]:
        node = reply.metadata.src_node_id
        if reply.metadata.message_type == "evaluate":
            number = counts[node] = counts.get(node, -1) + 1
            metrics = reply.content["metrics"]
            for name in ("loss", "personal_loss"):
                metrics[name] = [loss(node, number, value) for value in metrics[name]]
        return [reply]

    return tamper


@pytest.fixture
def run(make_config: Callable, watched_grid: Any, tmp_path: Path) -> Callable[..., Any]:
    """Return a function (what nodes say of losses, **flat overrides) -> (final state, notices)."""

    def do(loss: Loss = lambda node, number, value: value, **flat: Any) -> tuple[ServerState, list[str]]:
        notices: list[str] = []
        config = make_config({"run.output": str(tmp_path), "federation.num-rounds": 2, **flat})
        grid = watched_grid(app, local.local_grid(config, app, num_nodes=4).contexts)
        grid.tamper = saying(loss)
        return run_federation(config, grid, Watch(notice=notices.append)), notices

    return do


def result_in(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "result.json").read_text())


@pytest.mark.parametrize(
    "flat",
    [
        {"evaluation.every": 1, "train.local-steps": 1},  # the loss after the round is NaN
        {"data.held-out-fraction": 0.0, "train.local-steps": 1},  # nobody measures it
        {"data.held-out-fraction": 0.0, "train.local-steps": 3},  # training itself gives NaN
    ],
)
def test_a_diverged_run_publishes_nothing(flat: dict[str, Any], run: Callable, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"round 1 diverged.*train\.learning-rate") as caught:
        run(**TOO_FAST, **flat)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "adapter").exists()
    result = result_in(tmp_path)
    assert (result["status"], result["reason"]) == ("diverged", str(caught.value))


def test_the_last_finite_round_can_still_be_published(run: Callable, tmp_path: Path) -> None:
    flat = {"evaluation.every": 1, "federation.num-rounds": 3}
    with pytest.raises(DivergedError, match=r"round 2 diverged.*--resume federation\.num-rounds=1"):
        run(lambda node, number, loss: math.nan if number == 2 else loss, **flat)
    folder = tmp_path / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["round-00001"]
    assert not (folder / "adapter").exists()
    state, _ = run(**{"run.resume": True, "evaluation.every": 1, "federation.num-rounds": 1})
    assert state.round_num == 1
    assert result_in(tmp_path)["status"] == "completed"
    assert (folder / "adapter").exists()


def test_a_run_resumed_to_end_early_is_measured(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"round 2.*whose loss was not measured"):
        run(lambda node, number, loss: math.inf if number else loss)
    with pytest.raises(DivergedError, match=r"round 1.*its checkpoint is kept"):
        run(lambda node, number, loss: math.nan, **{"run.resume": True, "federation.num-rounds": 1})
    run(**{"run.resume": True, "federation.num-rounds": 1})
    assert set(result_in(tmp_path)["held_out"]) == {"before", "after"}


def test_one_client_alone_cannot_end_a_run(run: Callable, tmp_path: Path) -> None:
    state, notices = run(lambda node, number, loss: math.nan if node == 3 and number else loss)
    assert state.records[-1].not_finite == ("ben",)
    assert set(state.records[-1].held_out) == {"anna", "cleo", "dora"}
    (warning,) = result_in(tmp_path)["warnings"]
    assert "1 of 4 clients" in warning
    assert f"warning: {warning}" in notices


def test_a_loss_above_the_bases_is_said_everywhere(run: Callable, tmp_path: Path) -> None:
    _, notices = run(lambda node, number, loss: loss + 3 * number)
    result = result_in(tmp_path)
    (warning,) = result["warnings"]
    assert "above the base model's" in warning
    assert f"warning: {warning}" in notices
    assert warning in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_loss_that_fell_is_no_warning(run: Callable, tmp_path: Path) -> None:
    run()
    assert result_in(tmp_path)["warnings"] == []


def test_a_base_model_without_a_finite_loss_is_refused(make_config: Callable, open_run: Callable) -> None:
    opened = open_run(make_config(), tamper=saying(lambda node, number, loss: math.nan))
    with pytest.raises(DivergedError, match="the base model itself"):
        first_state(opened.session)


def test_the_python_interface_stops_at_a_diverged_round(make_config: Callable, tmp_path: Path) -> None:
    flat = {**TOO_FAST, "run.output": str(tmp_path), "train.local-steps": 1, "evaluation.every": 1}
    state = local.init(make_config(flat), num_nodes=4)
    with pytest.raises(DivergedError):
        local.step(state)


def test_a_client_that_reports_non_finite_counts(make_config: Callable, open_run: Callable) -> None:
    def fail(reply: Message) -> list[Message]:
        if reply.metadata.message_type == "evaluate":
            name = reply.content["clients"]["ids"][0]
            failure = ClientFailure(client_id=name, code="non-finite")
            reply.content = replies.write_evaluations([failure])
        return [reply]

    opened = open_run(make_config({"evaluation.every": 1}), tamper=fail)
    with pytest.raises(DivergedError, match="4 of 4 clients"):
        next_round(opened.session, opened.state)


@pytest.mark.parametrize(("finite", "others", "expected"), [(2, 2, True), (1, 2, False), (0, 0, True)])
def test_most_clients_decide_whether_a_round_is_finite(finite: int, others: int, expected: bool) -> None:
    held_out = {str(number): 1.0 for number in range(finite)}
    not_finite = tuple(f"other-{number}" for number in range(others))
    assert is_finite(RoundRecord(round_num=1, held_out=held_out, not_finite=not_finite)) is expected


def test_no_answer_is_not_taken_for_a_diverged_one(make_config: Callable, open_run: Callable) -> None:
    def silence(reply: Message) -> list[Message]:
        if reply.metadata.message_type == "evaluate":
            reply.content = RecordDict()
        return [reply]

    opened = open_run(make_config({"evaluation.every": 1}), tamper=silence)
    _, record = next_round(opened.session, opened.state)
    assert (dict(record.held_out), record.not_finite) == ({}, ())
