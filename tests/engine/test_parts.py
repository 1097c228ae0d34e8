"""Training one factor: the engine, fused or not, against PEFT with the other factor frozen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm.adapters.layout import at_rank, with_rank
from fedllm.adapters.parts import other_part, part_of, part_size
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.engine.kernels import LoopKernel, MaskedKernel
from fedllm.engine.layers import attached
from fedllm.engine.plain import train_plainly
from fedllm.engine.steps import step_gradients
from fedllm.models.attention import ragged

KERNELS = [LoopKernel(), MaskedKernel()]
EXACT = {"rtol": 0, "atol": 1e-12}
factor = pytest.mark.parametrize("trained", ["a", "b"])
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=["loop", "masked"])


def uneven_jobs(engine: Engine, make_job: Callable, trained: str) -> list[Job]:
    """Four clients that differ in rows, steps, clipping, decay, dropout and rank."""
    numbers: list[dict[str, Any]] = [
        {"steps": 3, "batch_size": 3, "weight_decay": 0.3},
        {"steps": 1, "batch_size": 4, "clip_norm": 0.01},
        {"steps": 2, "batch_size": 1, "clip_norm": 0.05, "weight_decay": 0.1},
        {"steps": 2, "batch_size": 2, "dropout": 0.3},
    ]
    jobs = []
    for seed, (name, values, rank) in enumerate(zip("abcd", numbers, (2, 1, 2, 1), strict=True)):
        layout = at_rank(engine.layout, rank)
        jobs.append(replace(make_job(layout, name, seed, **values), layout=layout, trained=trained))
    return jobs


@factor
@kernels
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("token_budget", [1, 60, 100_000])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_mixed_ranks_fused_equal_each_alone_through_peft(
    kind: str, kernel: object, trained: str, token_budget: int, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine(kind, token_budget=token_budget)
    engine.bank.kernel = kernel
    jobs = uneven_jobs(engine, make_job, trained)
    for job, result in zip(jobs, engine.train(jobs), strict=True):
        assert job.layout is not None
        alone = train_plainly(engine.base, job.layout, job)
        assert float(alone.abs().max()) > 1e-4
        torch.testing.assert_close(result.delta, alone, **EXACT)


@factor
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_frozen_factor_keeps_its_bits(
    trained: str, dtype: str, make_engine: Callable, make_job: Callable
) -> None:
    """Weight decay alone would move every value of a factor that is stepped."""
    engine = make_engine("llama", dtype, token_budget=100_000)
    jobs = [
        replace(make_job(engine.layout, name, seed, weight_decay=0.9, clip_norm=0.1), trained=trained)
        for seed, name in enumerate("ab")
    ]
    for result in engine.train(jobs):
        frozen = part_of(engine.layout, result.delta, other_part(trained))
        assert frozen.numel() > 0
        assert torch.equal(frozen, torch.zeros_like(frozen))
        assert bool((part_of(engine.layout, result.delta, trained) != 0).all())


@factor
@kernels
def test_the_gradient_of_one_factor_is_its_share_of_both(
    trained: str, kernel: object, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama")
    engine.bank.kernel = kernel
    jobs = [make_job(engine.layout, name, seed) for seed, name in enumerate("abc")]

    def gradients(part: str) -> torch.Tensor:
        engine.bank.load(engine.layout, [job.start for job in jobs], [engine.layout.scale] * 3, part)
        with attached(engine.base.model, engine.bank), ragged(engine.base.model):
            return step_gradients(engine.passes, engine.limits, jobs, 0)[0].clone()

    both, one = gradients("both"), gradients(trained)
    assert one.shape == (3, part_size(engine.layout, trained))
    for whole, part in zip(both, one, strict=True):
        torch.testing.assert_close(part, part_of(engine.layout, whole, trained), **EXACT)


@factor
def test_example_gradients_are_clipped_by_the_trained_factor(
    trained: str, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", token_budget=100_000)
    clip = 0.05
    job = replace(make_job(engine.layout, steps=1, batch_size=4), example_clip=clip, trained=trained)

    def gradient(rows: Any, example_clip: float) -> torch.Tensor:
        engine.bank.load(engine.layout, [job.start], [engine.layout.scale], trained)
        with attached(engine.base.model, engine.bank), ragged(engine.base.model):
            clipped = replace(job, batches=(rows,), example_clip=example_clip)
            return step_gradients(engine.passes, engine.limits, [clipped], 0)[0][0].clone()

    singles = [gradient((row,), 0.0) for row in job.batches[0]]
    assert min(float(single.norm()) for single in singles) > clip
    expected = sum(single * (clip / single.norm()) for single in singles) / 4
    torch.testing.assert_close(gradient(job.batches[0], clip), expected, **EXACT)


def test_jobs_of_different_parts_keep_order_and_results(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", token_budget=100_000)
    jobs = [
        replace(make_job(engine.layout, f"{part}{seed}", seed), trained=part)
        for seed, part in enumerate(("a", "a", "both", "b", "a"))
    ]
    results = list(engine.train(jobs))
    assert [result.client_id for result in results] == [job.client_id for job in jobs]
    for job, result in zip(jobs, results, strict=True):
        torch.testing.assert_close(result.delta, train_plainly(engine.base, engine.layout, job), **EXACT)


def test_smaller_ranks_are_held_at_the_widest_of_their_group(
    make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", token_budget=100_000)
    narrow = at_rank(engine.layout, 1)
    full = make_job(engine.layout, "a", 1).start
    job = replace(make_job(narrow, "a", 1), start=with_rank(full, engine.layout, 1), layout=narrow)
    (result,) = engine.train([job])
    assert engine.bank.theta_CP.shape == (1, narrow.size)
    torch.testing.assert_close(result.delta, train_plainly(engine.base, narrow, job), **EXACT)
