"""The engine on a GPU: against its plain twin and a CPU, twice, with and without neighbours, and its memory.

Bounds are relative to the norm of a delta. In float32 kernels of a GPU sum in another order, and AdamW moves
by the learning rate where a gradient is next to nothing; bfloat16 has two digits.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedllm.adapters.layout import AdapterState
from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob, Job, StepNoise
from fedllm.engine.plain import train_plainly
from fedllm.models.base import layout_of, load_base

pytestmark = pytest.mark.gpu

FLOAT32, BFLOAT16 = 2e-3, 0.5  # of unrelated deltas 1.4
KINDS = ["llama", "gpt2", "gemma3"]


def deltas(engine: Engine, jobs: list[Job]) -> list[torch.Tensor]:
    return [result.delta.cpu() for result in engine.train(jobs)]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm())


def some_jobs(engine: Engine, make_job: Callable) -> list[Job]:
    """Four clients that differ in rows and numbers."""
    numbers = [{"steps": 3, "batch_size": 3}, {"batch_size": 5}, {"clip_norm": 0.05}, {"weight_decay": 0.1}]
    return [
        make_job(engine.layout, name, seed, **n)
        for seed, (name, n) in enumerate(zip("abcd", numbers, strict=True))
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_float32_on_a_gpu_gives_the_plain_twins_deltas(
    kind: str, make_engine: Callable, make_job: Callable
) -> None:
    engine, exact = make_engine(kind, "float32", device="cuda"), make_engine(kind)
    jobs = some_jobs(engine, make_job)
    for job, found in zip(jobs, deltas(engine, jobs), strict=True):
        assert distance(found, train_plainly(exact.base, exact.layout, job)) < FLOAT32


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_on_a_gpu_is_near_float32(kind: str, make_engine: Callable, make_job: Callable) -> None:
    engine, exact = make_engine(kind, "bfloat16", device="cuda"), make_engine(kind)
    jobs = some_jobs(engine, make_job)
    found, expected = list(engine.train(jobs)), list(exact.train(jobs))
    for one, other in zip(found, expected, strict=True):
        assert abs(one.loss - other.loss) < 2e-2
        assert distance(one.delta, other.delta) < BFLOAT16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_the_same_bits_every_time(dtype: str, make_engine: Callable, make_job: Callable) -> None:
    """The third time a recorded graph may run; rows here are short enough for attention to keep its order."""
    engine = make_engine("llama", dtype, device="cuda")
    jobs = some_jobs(engine, make_job)
    first, *others = (deltas(engine, jobs) for _ in range(4))
    for again in others:
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_clients_fused_on_a_gpu_equal_each_alone(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", "float32", device="cuda")
    jobs = some_jobs(engine, make_job)
    for job, fused in zip(jobs, deltas(engine, jobs), strict=True):
        assert distance(fused, deltas(engine, [job])[0]) < FLOAT32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_row_changes_nothing_of_a_private_neighbour(
    dtype: str, make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    """Two clients of clipped rows: what one of them holds moves no bit of the other."""
    engine = make_engine("llama", dtype, device="cuda")
    first, second = (
        replace(make_job(engine.layout, name, seed, batch_size=4), example_clip=0.01)
        for seed, name in enumerate("ab")
    )
    lengths = [[len(row.tokens) for row in batch] for batch in second.batches]
    changed = replace(
        second, batches=tuple(make_rows(batch, seed=90 + step) for step, batch in enumerate(lengths))
    )
    before, after = deltas(engine, [first, second]), deltas(engine, [first, changed])
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_a_private_step_on_a_gpu_is_that_of_a_cpu(make_engine: Callable, make_job: Callable) -> None:
    """The noise hides the very gradient, whose last bits differ: without it the steps agree."""
    engine, exact = make_engine("llama", "float32", device="cuda"), make_engine("llama")
    job = replace(make_job(engine.layout, batch_size=4), example_clip=0.05)
    assert distance(deltas(engine, [job])[0], deltas(exact, [job])[0]) < FLOAT32
    noisy = replace(job, noise=StepNoise(bytes(32), 0.05))
    assert distance(deltas(engine, [noisy])[0], deltas(engine, [job])[0]) > 10 * FLOAT32


def test_evaluation_and_generation_on_a_gpu_are_those_of_a_cpu(
    make_engine: Callable, make_job: Callable
) -> None:
    on_gpu, on_cpu = make_engine("llama", "float32", device="cuda"), make_engine("llama", "float32")
    job = make_job(on_gpu.layout)
    measured = [
        engine.evaluate([EvaluationJob("a", job.start, job.batches[0])])[0].loss
        for engine in (on_gpu, on_cpu)
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    states = [AdapterState(on_gpu.layout, job.start)] * 2
    prompts = ["Sort the list", "Open a file and read"]
    assert on_gpu.generate(states, prompts, 8) == on_cpu.generate(states, prompts, 8)


def test_training_gives_its_memory_back(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", "bfloat16", device="cuda")
    jobs = some_jobs(engine, make_job)
    held = []
    for _ in range(6):
        deltas(engine, jobs)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[-2] == held[-3]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantised_base_trains(
    quantization: str, make_model_folder: Callable[..., Path], make_job: Callable
) -> None:
    config = ModelConfig(name=str(make_model_folder()), device="cuda", quantization=quantization)
    base = load_base(config)
    engine = Engine(base, layout_of(base.model, LoraConfig(rank=2, alpha=6.0), base.fingerprint))
    job = make_job(engine.layout, steps=8)
    (result,) = engine.train([job])
    assert result.losses[-1] < result.losses[0]
