"""Rounds that end with a distillation step: what it changes, what it tells, what it is refused with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg

from clients.client_app import app
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError, DataError
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from fedllm.wire.stock import read_plain, write_plain
from scripts.runtimes.local import local_grid
from strategies.distillation.report import describe_step, table_cell
from strategies.flower_strategy import FederatedLora
from strategies.rounds import next_round
from strategies.session import Watch
from strategies.start import open_session
from tests.strategies.distillation.builders import CHEAP, FEW, NAMES, PRIVATE, STEP, steps_of


@pytest.mark.parametrize(("when", "expected"), [("never", []), ("last", [3]), ("every", [1, 2, 3])])
def test_a_step_is_due_never_last_or_in_every_round(when: str, expected: list[int]) -> None:
    plan = resolve(RunConfig.from_flat({"distill.when": when})).distillation
    assert [number for number in (1, 2, 3) if plan is not None and plan.is_due(number)] == expected


def test_a_kept_step_changes_the_adapter_and_is_reported(run: Callable, tmp_path: Path) -> None:
    plain, _ = run("plain", **{"federation.num-rounds": 1})
    many = {**CHEAP, "distill.num-texts": 48, "distill.when": "last", "federation.num-rounds": 1}
    state, notices = run("distilled", **many)
    (step,) = steps_of(state)
    assert step.kept, step
    losses, texts = step.losses, step.texts
    assert losses.held_out.after < losses.held_out.before
    assert state.records[-1].adapter == state.adapter.digest != plain.adapter.digest
    assert (step.teachers.kind, texts.kind, texts.held_out_kind) == ("posterior", "synthetic", "synthetic")
    assert (step.teachers.number, texts.num_held_out) == (4, 12)
    assert 0 < texts.number <= 48
    assert losses.control is None
    assert step.num_tokens > 0
    assert step.target_bytes > 0
    for weights in step.teachers.weights.values():
        assert set(weights) == set(NAMES)
        assert sum(weights.values()) == pytest.approx(1, abs=1e-4)
    (line,) = [line for line in notices if "distilled" in line]
    assert line == f"round 1: {describe_step(step)}"
    assert "held-out texts synthetic too" in line
    written = json.loads((tmp_path / "distilled" / "rounds.jsonl").read_text().splitlines()[-1])
    assert written["distillation"]["losses"]["held_out"]["after"] == losses.held_out.after
    card = (tmp_path / "distilled" / "adapter" / "README.md").read_text()
    assert f"{losses.held_out.before:.4f} before, {losses.held_out.after:.4f} after" in card
    assert not any(name in card for name in NAMES), "a card names no data holder"


@pytest.mark.parametrize("rate", [pytest.param(1.0, marks=pytest.mark.soak), 1e30])
def test_a_harmful_step_is_refused_and_the_aggregate_stays(
    rate: float, run: Callable, public_file: str
) -> None:
    plain, _ = run("plain", **{"federation.num-rounds": 1})
    absurd = {**CHEAP, "distill.text": public_file, "distill.learning-rate": rate, "federation.num-rounds": 1}
    state, notices = run("absurd", **absurd)
    (step,) = steps_of(state)
    assert not step.kept
    assert "did not improve" in step.reason or "diverged" in step.reason
    assert state.adapter.digest == plain.adapter.digest == state.records[-1].adapter
    assert state.records[-1].held_out == plain.records[-1].held_out
    assert any("not distilled" in line for line in notices)


@pytest.mark.soak
def test_public_text_and_the_control_are_measured(run: Callable, public_file: str) -> None:
    for text, kind in ((public_file, "public"), (f"synthetic+{public_file}", "both")):
        flat = {**CHEAP, "distill.text": text, "distill.control": True, "federation.num-rounds": 1}
        state, notices = run(kind, **flat)
        (step,) = steps_of(state)
        assert (step.texts.kind, step.texts.held_out_kind) == (kind, "public")
        assert step.texts.num_held_out == (6 if kind == "public" else 3)
        assert set(step.losses.domains) <= set(NAMES)
        assert step.losses.control is not None
        assert any("fine-tuning on the same texts" in line for line in notices)


@pytest.mark.parametrize("read_out", ["residual", pytest.param("stack", marks=pytest.mark.soak)])
def test_the_student_learns_on_the_base_the_round_leaves(
    read_out: str, run: Callable, public_file: str
) -> None:
    """It is another than the teachers'; were it not, the loss before would not be the aggregate's."""
    flat = {**CHEAP, "aggregation.read-out": read_out, "distill.text": public_file}
    state, _ = run(read_out, **flat)
    first, second = steps_of(state)
    assert first.losses.base == second.losses.base, "the base model is the same in every round"
    assert first.kept
    assert first.losses.held_out.after < first.losses.held_out.before < first.losses.base


def test_flowers_own_loop_has_the_step_too(make_config: Callable) -> None:
    """`configure_train` and `aggregate_train` end a round as our own loop does."""
    flat = {**CHEAP, **FEW, "wire.codec": "fp32", "train.token-budget": 1}
    config = make_config({**flat, "federation.num-rounds": 1})
    heard: list[str] = []
    strategy = FederatedLora(config, Watch(notice=heard.append))
    grid = local_grid(config, app, num_nodes=2)
    session = open_session(resolve(config), grid)
    arrays = write_plain(session.initial)
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    answer, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    state, record = next_round(session, ServerState(0, session.initial))
    assert read_plain(answer, session.layout).digest == state.adapter.digest
    assert record.distillation is not None
    assert [line for line in heard if line.startswith("round 1: ")]


def test_a_stock_strategy_and_a_step_are_refused_together(make_config: Callable) -> None:
    config = make_config({**CHEAP, "aggregation.read-out": "factor-mean"})
    with pytest.raises(ConfigError, match=r"a stock Flower strategy.*distill\.when = 'never'"):
        open_session(resolve(config), local_grid(config, app), stock=FedAvg())


def test_unreadable_public_text_ends_a_run_before_round_1(run: Callable) -> None:
    heard: list[RoundRecord] = []
    with pytest.raises(DataError, match=r"^distill\.text: /no/such/file\.jsonl: no such file"):
        run("unread", heard.append, **{**CHEAP, "distill.text": "/no/such/file.jsonl"})
    assert heard == []


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"distill.text": " "}, ["distill.text"]),
        ({"wire.node-sum": True, "aggregation.read-out": "factor-mean"}, ["distill.when", "wire.node-sum"]),
        ({"aggregation.preset": "fedsa"}, ["distill.when", "aggregation.read-out"]),
        ({"distill.gate": "clients", "data.held-out-fraction": 0.0}, ["distill.gate", "data.held-out-frac"]),
        ({"distill.gate": "clients", "data.max-held-out": 0}, ["distill.gate", "data.max-held-out"]),
        ({"distill.num-texts": 3278}, ["distill.num-texts", "4098", "4096"]),
        ({"distill.num-texts": 8194, "distill.text": "synthetic+a.jsonl"}, ["distill.num-texts", "4096"]),
        ({"distill.max-tokens": 4097, "distill.text": "synthetic+a.jsonl"}, ["distill.max-tokens", "4097"]),
        ({"distill.max-tokens": 4097, "distill.originality": "on"}, ["distill.originality = 'off'"]),
    ],
)
def test_what_a_step_cannot_go_with_is_refused(flat: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig.from_flat({"distill.when": "last", **flat}))
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    resolve(RunConfig.from_flat(flat))  # where nothing is distilled it may stand


@pytest.mark.parametrize(
    "flat",
    [
        {"distill.num-texts": 3276, "distill.max-tokens": 4096},  # 4,095 with those held out
        {"distill.num-texts": 8192, "distill.text": "synthetic+a.jsonl"},
        {"distill.num-texts": 9999, "distill.max-tokens": 9999, "distill.text": "a.jsonl"},
        {"distill.num-texts": 9999, "distill.max-tokens": 9999, "distill.originality": "off"},
        {"distill.num-texts": 9999, "distill.max-tokens": 9999, **PRIVATE},
    ],
    ids=["as many as fit", "half public", "public alone", "not screened", "private"],
)
def test_texts_that_need_no_screening_may_be_many(
    flat: dict[str, Any],
) -> None:
    resolve(RunConfig.from_flat({"distill.when": "last", **flat}))


def test_the_table_shows_the_change_or_a_refusal() -> None:
    assert table_cell(None) == ""
    assert table_cell(STEP) == "-0.500"
    assert table_cell(replace(STEP, kept=False)) == "refused"
