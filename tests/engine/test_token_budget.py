"""The token budget: measured, and never a reason to fail."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedllm.engine.engine import Engine
from fedllm.engine.flat_row import FlatRow
from fedllm.engine.jobs import EvaluationJob
from fedllm.engine.token_budget import LARGEST, SMALLEST, measured_budget, smaller_budget


def wait() -> None:
    """A pass here is done when it returns."""


def test_the_measured_budget_is_a_size_that_was_tried() -> None:
    tried: list[int] = []
    measured = measured_budget(tried.append, wait)
    assert measured in tried
    assert measured & (measured - 1) == 0


def test_a_machine_out_of_memory_keeps_what_fitted() -> None:
    def run_pass(size: int) -> None:
        if size > 512:
            raise torch.OutOfMemoryError

    assert measured_budget(run_pass, wait) <= 512


def test_smallest_budget_where_no_pass_can_be_timed() -> None:
    tried: list[int] = []

    def run_pass(size: int) -> None:
        tried.append(size)
        if len(tried) > 1:  # the one that warms up fits
            raise torch.OutOfMemoryError

    assert measured_budget(run_pass, wait) == SMALLEST


def test_smaller_budget_halves_what_a_pass_really_held() -> None:
    assert smaller_budget(1000, [60, 40, 20]) == 60
    assert smaller_budget(60, [60, 40, 20]) == 0
    assert smaller_budget(50, []) == 0


def out_of_memory_above(engine: Engine, most: int) -> list[int]:
    """Let passes of more tokens fail half-way, with gradients that count no more; return the sizes tried."""
    tried, trunk = [], engine.passes.trunk

    def limited(flat: FlatRow) -> torch.Tensor:
        tried.append(len(flat.tokens_T))
        if tried[-1] > most:
            engine.bank.grad_SP.add_(1.0)
            raise torch.OutOfMemoryError
        return trunk(flat)

    engine.passes = replace(engine.passes, trunk=limited)
    return tried


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_training_out_of_memory_goes_on_in_smaller_passes(
    clip: float,
    make_engine: Callable,
    make_job: Callable,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedllm.engine.token_budget.CPU_STEP_TOKENS", 1)  # a GPU splits every step
    engine = make_engine("llama", token_budget=512)
    jobs = [replace(make_job(engine.layout, str(n), n, batch_size=4), example_clip=clip) for n in range(3)]
    expected = list(engine.train(jobs))
    tried, released, release = out_of_memory_above(engine, 50), [], engine.bank.release
    monkeypatch.setattr(
        engine.bank, "release", lambda: (release(), released.append(len(engine.bank.grad_SP)))
    )
    for found, wanted in zip(engine.train(jobs), expected, strict=True):
        torch.testing.assert_close(found.delta, wanted.delta, rtol=0, atol=1e-12)
        assert found.losses == pytest.approx(wanted.losses, abs=1e-12)
    assert max(tried) > 50
    assert len(caplog.messages) == sum(size > 50 for size in tried)
    assert released == [0] * len(caplog.messages)  # adapters are not held twice
    tried.clear()
    list(engine.train(jobs))  # what was learnt stays
    assert max(tried) <= 50


def test_evaluation_out_of_memory_goes_on_in_smaller_passes(
    make_engine: Callable, make_rows: Callable
) -> None:
    engine = make_engine("llama", token_budget=512)
    jobs = [
        EvaluationJob(str(n), torch.ones(engine.layout.size) / 9, make_rows([9, 20], n)) for n in range(3)
    ]
    expected = [each.loss for each in engine.evaluate(jobs)]
    out_of_memory_above(engine, 30)
    assert [each.loss for each in engine.evaluate(jobs)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.gpu
def test_budget_of_a_gpu_is_measured_and_remembered(
    make_engine: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    engine = make_engine("llama", "bfloat16", token_budget="auto", device="cuda")
    assert SMALLEST <= engine.token_budget <= LARGEST
    monkeypatch.setattr("fedllm.engine.token_budget.measured_budget", None)  # not called again
    again = make_engine("llama", "bfloat16", token_budget="auto", device="cuda")
    assert again.token_budget == engine.token_budget


def test_row_that_is_too_much_alone_is_out_of_memory(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", token_budget=512)
    out_of_memory_above(engine, 2)
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.train([make_job(engine.layout)]))


def test_no_more_adapters_are_held_than_memory_has_room_for(
    make_engine: Callable, make_job: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedllm.engine.engine.rows_in_memory", lambda _: 2)
    engine, held = make_engine("llama", token_budget=512), []
    load = engine.bank.load
    monkeypatch.setattr(engine.bank, "load", lambda *args: (held.append(len(args[1])), load(*args)))
    jobs = [make_job(engine.layout, str(n), n) for n in range(5)]
    assert [result.client_id for result in engine.train(jobs)] == list("01234")
    assert held == [2, 2, 1]
    list(engine.train([replace(jobs[0], example_clip=1.0)]))
    assert len(engine.bank.grad_SP) == 2
