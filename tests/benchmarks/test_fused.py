"""The fused benchmark on a model of a few thousand weights: its jobs, its cells, its goals, one run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.benchmarks import fused
from scripts.benchmarks.fused import cells, goals_of, main, make_jobs, open_bench, row_lengths
from scripts.benchmarks.models import REAL, TINY, random_base, random_rows
from scripts.benchmarks.options import ModelOptions
from scripts.reports import Spread

pytestmark = pytest.mark.usefixtures("small_shapes")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("num_tokens", [25, 100, 101, 200, 250])
def test_a_client_step_has_the_tokens_it_is_named_for(num_tokens: int) -> None:
    lengths = row_lengths(num_tokens)
    assert sum(lengths) == num_tokens
    assert max(lengths) <= 100


def test_no_more_clients_than_fill_four_passes_are_measured() -> None:
    found = cells(512, quick=False)
    assert found[25] == (1, 2, 4, 8, 16, 32)
    assert found[400] == (1, 2, 4)
    assert all(size * max(numbers) <= 4 * 512 for size, numbers in found.items())
    assert cells(8192, quick=False)[400] == (1, 2, 4, 8, 16, 32)


def test_clients_differ_and_are_the_same_every_time() -> None:
    bench = open_bench(TINY, "cpu", "all-linear", 0, 1)
    jobs, again = make_jobs(bench, 3, (5, 7), steps=2), make_jobs(bench, 3, (5, 7), steps=2)
    assert len({job.batches for job in jobs}) == 3
    assert not torch.equal(jobs[0].start, jobs[1].start)
    for job, same in zip(jobs, again, strict=True):
        assert job.batches == same.batches
        assert torch.equal(job.start, same.start)


def test_random_model_repeats_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (random_base(TINY, CPU) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    weights = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    assert first.fingerprint == second.fingerprint


def test_every_random_row_learns_something_and_its_share() -> None:
    rows = random_rows((1, 2, 8, 100), 64, 0, 0.25)
    assert [sum(label >= 0 for label in row.labels) for row in rows] == [1, 1, 2, 25]
    assert all(0 <= token < 64 for row in rows for token in row.tokens)


def _figures(share: float, ratio: float) -> dict[str, Any]:
    budget = {"share_of_limit": Spread(share, share, share)}
    cell = {"alone_over_fused": Spread(ratio, ratio, ratio)}
    return {
        "token_budget": 512,
        "budget": {"budgets": {"128": {}, "512": budget}},
        "cells": {"200": {"8": cell}},
    }


def test_fusing_is_judged_on_a_gpu_only_and_not_for_tiny() -> None:
    figures = _figures(0.8, 6.0)
    assert goals_of(TINY, GPU, figures) == {}
    on_cpu = goals_of(REAL, CPU, figures)
    assert {name: goal.met for name, goal in on_cpu.items()} == {"share_of_gemm_limit": False}
    on_gpu = goals_of(REAL, GPU, figures)
    assert set(on_gpu) == {"share_of_gemm_limit", "fused_8_over_alone_at_200_tokens"}
    assert all(goal.met for goal in on_gpu.values())
    assert not goals_of(REAL, GPU, _figures(0.8, 4.9))["fused_8_over_alone_at_200_tokens"].met


@pytest.mark.soak
def test_a_run_on_the_tiny_model_ends_in_one_json_object(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "QUICK_CELLS", {10: (1, 3), 120: (2,)})
    monkeypatch.setattr(fused, "BUDGET_CLIENTS", 3)
    kept = tmp_path / "new" / "figures.json"
    main(ModelOptions(quick=True, model=TINY, device="cpu", json=True, output=kept))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(kept.read_text())
    assert (result["name"], result["goals"]) == ("bench_fused", {})
    figures = result["figures"]["models"]["tiny"]
    assert figures["cells"]["10"]["3"]["clients_in_a_pass"] == 3
    assert 0 <= figures["cells"]["120"]["2"]["delta_difference"] <= 1e-3
    assert set(figures["budget"]["budgets"]) == {"128", "512", "2048"}
    assert figures["budget"]["budgets"]["512"]["seconds_over_own"] == {"min": 1, "median": 1, "max": 1}
