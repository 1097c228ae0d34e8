"""The benchmark of a GPU: what it judges, and one part on a model of a few thousand weights."""

import pytest
import torch
from rich.console import Console

from fedllm.engine.engine import Engine
from scripts.benchmarks.gpu.main import GOALS, goals_of, parts_of, show
from scripts.benchmarks.gpu.steps import measure_steps, step_flop, step_jobs
from scripts.benchmarks.models import TINY, bench_engine

pytestmark = pytest.mark.usefixtures("small_shapes")


@pytest.fixture
def engine() -> Engine:
    return bench_engine(TINY, "cpu", "all-linear")


@pytest.mark.parametrize(("tokens", "clients", "rows"), [(2000, 8, 10), (8192, 8, 40), (200, 3, 3)])
def test_a_step_has_its_rows_dealt_out_to_all_clients(
    tokens: int, clients: int, rows: int, engine: Engine
) -> None:
    jobs = step_jobs(engine, tokens, clients, 1, seed=0)
    sizes = [len(job.batches[0]) for job in jobs]
    assert len(jobs) == clients
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1


def test_a_steps_arithmetic_is_that_of_its_frozen_products(engine: Engine) -> None:
    text = engine.base.model.config
    trunk = sum(matrix.in_features * matrix.out_features for matrix in engine.layout.matrices)
    head = text.vocab_size * text.hidden_size
    assert step_flop(engine, 100) == 4 * 100 * trunk + 4 * 50 * head


def test_a_part_that_failed_reaches_no_goal() -> None:
    found = {"demo": {"error": "not done after 60 s"}, "rounds": {"over_bare": {"median": 1.05}}}
    goals = goals_of(found)
    assert len(goals) == len(GOALS)
    assert not goals["demo_s"].met
    assert not goals["135M_32768_tokens_share"].met
    assert goals["round_over_bare_engine"].met


def test_all_parts_together_take_less_than_eight_minutes() -> None:
    assert sum(part.limit_s for part in parts_of("cpu", quick=False).values()) <= 480


@pytest.mark.soak
def test_figures_of_a_part_are_shown_by_name() -> None:
    figures = measure_steps(TINY, {(400, 2): "400 tokens"}, "cpu", quick=True)
    assert figures["400 tokens"]["tokens_per_s"] > 0
    console = Console(record=True, width=120)
    show(console, {"steps": figures}, {})
    assert "steps: 400 tokens: share_of_peak" in console.export_text()


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_timed_by_its_events() -> None:
    figures = measure_steps(TINY, {(400, 2): "400 tokens"}, "cuda", quick=True)
    assert figures["400 tokens"]["ms"].median > 0
    assert torch.cuda.is_initialized()
