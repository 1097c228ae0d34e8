"""Runs that stop, resume or grow longer around a distillation step."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.runs.records import RoundRecord
from tests.strategies.distillation.builders import CHEAP, FEW, PRIVATE, steps_of


def timeless(record: RoundRecord) -> dict[str, Any]:
    values = asdict(record)
    step, training = values["distillation"], {**values["training"], "seconds": {}}
    return {**values, "seconds": 0, "training": training, "distillation": step and {**step, "seconds": 0}}


@pytest.mark.soak
@pytest.mark.parametrize("stopped_in", [1, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    stopped_in: int, run: Callable, public_file: str
) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round_num == stopped_in:
            raise KeyboardInterrupt

    flat = {**CHEAP, **FEW, "distill.text": f"synthetic+{public_file}"}
    whole, _ = run("whole", **flat)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop, **flat)
    resumed, _ = run("stopped", **flat, **({"run.resume": True} if stopped_in > 1 else {}))
    assert len(steps_of(whole)) == 2
    assert resumed.adapter.digest == whole.adapter.digest
    assert [timeless(record) for record in resumed.records] == [timeless(record) for record in whole.records]


@pytest.mark.soak
def test_a_longer_run_goes_on_from_what_was_aggregated(run: Callable) -> None:
    flat = {**CHEAP, **FEW, "distill.when": "last", "distill.learning-rate": 1e-3}
    whole, _ = run("whole", **flat, **{"federation.num-rounds": 3})
    short, _ = run("longer", **flat)
    assert short.records[-1].distillation.kept
    assert short.undistilled.digest != short.adapter.digest
    longer, _ = run("longer", **flat, **{"run.resume": True, "federation.num-rounds": 3})
    assert longer.adapter.digest == whole.adapter.digest
    assert [timeless(record)["distillation"] for record in longer.records] == [
        timeless(record)["distillation"] for record in whole.records
    ]
    assert [record.adapter for record in longer.records] == [record.adapter for record in whole.records]


@pytest.fixture
def two_rounds(run: Callable) -> dict[str, Any]:
    """Return the keys of a private run that distils last and whose budget is spent after two rounds."""
    flat = {**CHEAP, **FEW, **PRIVATE, "distill.when": "last", "privacy.noise-multiplier": 2.0}
    state, _ = run("probe", **{**flat, "distill.when": "never", "privacy.epsilon": 1e5})
    return {**flat, "privacy.epsilon": 1.01 * state.ledger.epsilon(RunConfig().privacy.delta)}


def test_a_run_out_of_budget_keeps_what_it_has_try_step(
    run: Callable, two_rounds: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under so much noise a student need not be better.
    monkeypatch.setattr("strategies.distillation.step.judge_losses", lambda *_, **__: (True, "it is kept"))
    done, notices = run("spent", **two_rounds)
    assert not any("is not done" in line for line in notices)
    again, notices = run("spent", **two_rounds, **{"run.resume": True, "federation.num-rounds": 3})
    assert any("budget is spent" in line for line in notices)
    assert again.round_num == 2
    assert again.adapter.digest == done.adapter.digest != done.undistilled.digest
    assert again.records[-1].distillation == done.records[-1].distillation is not None
    assert again.records[-1].held_out == done.records[-1].held_out


def test_a_run_that_ends_before_its_step_says_so(
    run: Callable, two_rounds: dict[str, Any], tmp_path: Path
) -> None:
    state, notices = run("short", **two_rounds, **{"federation.num-rounds": 3})
    assert steps_of(state) == []
    (line,) = [line for line in notices if "budget is spent" in line]
    assert line.endswith("; the distillation step planned after round 3 is not done")
    assert json.loads((tmp_path / "short" / "result.json").read_text())["stopped"] == line


@pytest.mark.soak
def test_a_finished_run_that_is_resumed_stays_try_step(run: Callable) -> None:
    flat = {**CHEAP, **FEW, "distill.when": "last"}
    done, _ = run("done", **flat)
    again, _ = run("done", **flat, **{"run.resume": True})
    assert again.adapter.digest == done.adapter.digest
    assert again.records[-1].distillation == done.records[-1].distillation
