"""Gradients per example, as DP-SGD needs them: fedllm's engine compared with itself without them, and Opacus.

Five variants train the same rows from the same adapter with the same AdamW, base model resident and frozen:

- **not private**: `Engine.train`, the gradient of the batch's mean loss.
- **fedllm**: `Engine.train` as a private client calls it (arXiv 1607.00133): every row's own gradient clipped
  (`Job.example_clip`), and Gaussian noise from a cryptographic stream on their mean (`Job.noise`).
- **without noise**: the same but for the noise.
- **Opacus hooks**: `GradSampleModule` around PEFT's LoRA model.
- **Opacus ghost**: `GradSampleModuleFastGradientClipping`, norms without gradients, a second backward pass.

The last three must give the same delta before anything is timed, and again every time; noise would hide what
is compared. The goals are fedllm's with its noise, though Opacus is timed without any: this favours Opacus.
The clip is the median norm of the first batch's
examples, so that about half of them are cut. As Opacus users do, its rows are padded to the longest of the
batch and all logits are formed; `full rows` has nothing to pad.

    python -m scripts.benchmarks private_training --quick --json
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedllm.adapters.layout import initial_adapter
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job, StepNoise
from fedllm.privacy.keys import NUM_BYTES, derived_key
from fedllm.seeds import derive_seed
from scripts.benchmarks.agreement import TOLERANCES, compare
from scripts.benchmarks.models import TINY, bench_engine, plain_training, random_rows, vocabulary_of
from scripts.benchmarks.options import ModelOptions, start_benchmark
from scripts.benchmarks.peers.opacus import OpacusTrainer, quiet_hooks, require_opacus
from scripts.charts import bars
from scripts.reports import Goal, figures_table, megabytes, publish

NOT_PRIVATE, FEDLLM, NOISELESS = "not private", "fedllm", "without noise"
HOOKS, GHOST = "Opacus hooks", "Opacus ghost"
PACKAGES = ("fedllm", "torch", "transformers", "peft", "opacus")
BATCH_SIZES = (4, 16)
STEPS = 2
NOISE_MULTIPLIER = 1.0  # how much noise does not matter to what it costs
# Tokens of the first rows one client draws from fedllm's default source (docs/results/bench_client.json),
# a quarter of them learnt; and rows as long as allowed, all of them learnt.
DOCSTRINGS = (113, 54, 65, 72, 61, 97, 72, 97, 89, 82, 57, 75, 73, 96, 61, 113)
ROWS = {"docstrings": (DOCSTRINGS, 0.25), "full rows": ((128,), 1.0)}
GOAL_NOT_PRIVATE, GOAL_HOOKS = 1.05, 1.0


@dataclass(frozen=True, eq=False)
class Bench:
    """What every measurement shares: one resident base model, and who trains on it."""

    name: str
    engine: Engine
    hooks: OpacusTrainer
    ghost: OpacusTrainer
    seed: int
    repetitions: int


def open_bench(
    name: str, device: str, targets: str, seed: int, repetitions: int, dtype: str = "auto"
) -> Bench:
    """Return a base model with its trainers, all of them resident."""
    engine = bench_engine(name, device, targets, dtype)
    hooks, ghost = (OpacusTrainer(engine.base.model, engine.layout, ghost=ghost) for ghost in (False, True))
    return Bench(name, engine, hooks, ghost, seed, repetitions)


def make_job(bench: Bench, batch_size: int, rows: str) -> Job:
    """Return a job of so many rows a step, clipped at the median norm of its first batch's examples."""
    lengths, learnt_share = ROWS[rows]
    layout = bench.engine.layout
    training = plain_training(STEPS, batch_size, clip_norm=0.0)
    count = STEPS * batch_size
    drawn = random_rows(
        [lengths[number % len(lengths)] for number in range(count)],
        vocabulary_of(bench.engine.base),
        derive_seed(bench.seed, "bench-dp-rows"),
        learnt_share,
    )
    generator = torch.Generator().manual_seed(derive_seed(bench.seed, "bench-dp-start"))
    start = initial_adapter(layout, bench.seed).vector + 0.01 * torch.randn(layout.size, generator=generator)
    batches = tuple(drawn[begin : begin + batch_size] for begin in range(0, count, batch_size))
    job = Job("dp", start, batches, training)
    return replace(job, example_clip=float(bench.hooks.example_norms(job).median()))


def noised(job: Job, seed: int) -> Job:
    """Return a job with the noise of a private client on every step's mean gradient."""
    deviation = NOISE_MULTIPLIER * job.example_clip / job.training.batch_size
    key = derived_key(bytes(NUM_BYTES), "bench-dp-noise", seed)  # a benchmark has no secret to keep
    return replace(job, noise=StepNoise(key, deviation))


def train(engine: Engine, job: Job) -> torch.Tensor:
    """Return the delta [1, P] of one job."""
    return torch.stack([result.delta for result in engine.train([job])])


def measure_workload(bench: Bench, batch_size: int, rows: str) -> dict[str, Any]:
    """Return what the variants cost on one kind of batch, as the report keeps it.

    Raises:
        RuntimeError: the private variants without noise did not train the same adapter.
    """
    engine, job = bench.engine, make_job(bench, batch_size, rows)
    noiseless: dict[str, Callable[[], torch.Tensor]] = {
        NOISELESS: lambda: train(engine, job),
        HOOKS: lambda: bench.hooks.train(job)[None],
        GHOST: lambda: bench.ghost.train(job)[None],
    }
    open_job, private_job = replace(job, example_clip=0.0), noised(job, bench.seed)
    compared = compare(
        noiseless,
        engine.base.device,
        bench.repetitions,
        TOLERANCES[engine.base.dtype],
        apart={
            NOT_PRIVATE: lambda: train(engine, open_job),
            FEDLLM: lambda: train(engine, private_job),
        },
    )
    lengths = [len(row.tokens) for batch in job.batches for row in batch]
    padded = sum(len(batch) * max(len(row.tokens) for row in batch) for batch in job.batches)
    return {
        "tokens": sum(lengths),
        "padded_slots_per_token": padded / sum(lengths),
        "clip": job.example_clip,
        "noise_deviation": private_job.noise.deviation if private_job.noise else 0.0,
        "delta_difference": compared.difference,
        "variants": {
            name: {**compared.figures(name), "seconds_over_not_private": compared.ratio(name, NOT_PRIVATE)}
            for name in compared.timings
        },
        "fedllm_over_hooks": compared.ratio(FEDLLM, HOOKS),
        "fedllm_over_ghost": compared.ratio(FEDLLM, GHOST),
        "fedllm_over_without_noise": compared.ratio(FEDLLM, NOISELESS),
    }


def workloads(*, quick: bool, name: str) -> Iterator[tuple[int, str]]:
    """Yield the batch sizes and kinds of rows that are measured."""
    for batch_size in BATCH_SIZES[:1] if quick and name != TINY else BATCH_SIZES:
        for rows in ("docstrings",) if quick else ROWS:
            yield batch_size, rows


def measure(bench: Bench, *, quick: bool) -> dict[str, Any]:
    """Return everything that is measured on one base model."""
    return {
        f"{rows}, batch {batch_size}": measure_workload(bench, batch_size, rows)
        for batch_size, rows in workloads(quick=quick, name=bench.name)
    }


def goals_of(found: Mapping[str, Any]) -> dict[str, Goal]:
    """Return what the figures of one base model are judged by: the worst of its workloads, noise included."""
    over_plain = [one["variants"][FEDLLM]["seconds_over_not_private"].median for one in found.values()]
    over_hooks = [one["fedllm_over_hooks"].median for one in found.values()]
    return {
        "dp_over_non_private": Goal(max(over_plain), GOAL_NOT_PRIVATE, at_most=True),
        "dp_over_opacus_hooks": Goal(max(over_hooks), GOAL_HOOKS, at_most=True),
    }


def show(console: Console, name: str, found: Mapping[str, Any]) -> None:
    """Print one base model's tables."""
    for workload, figures in found.items():
        console.print(
            f"\n{name}, {workload}: {figures['tokens']} tokens, {figures['padded_slots_per_token']:.2f} slots"
            f" per token where padded; clip {figures['clip']:.3g}; deltas agree to"
            f" {figures['delta_difference']:.0e}",
            soft_wrap=True,
        )
        variants = figures["variants"]
        rows = {
            "CPU s": [one["cpu_s"].text() for one in variants.values()],
            "wall s": [one["wall_s"].text() for one in variants.values()],
            "seconds over not private": [one["seconds_over_not_private"].text() for one in variants.values()],
            "peak MB": [megabytes(one["peak_bytes"]) for one in variants.values()],
        }
        console.print(figures_table("min, median and max over the repetitions", tuple(variants), rows))


def plot(path: Path, name: str, found: Mapping[str, Any]) -> None:
    """Draw what privacy costs: each variant's seconds over those of training without it."""
    groups = {
        workload: {
            variant: one["seconds_over_not_private"]
            for variant, one in figures["variants"].items()
            if variant != NOT_PRIVATE
        }
        for workload, figures in found.items()
    }
    title = f"{name}: gradients per example"
    bars(path, title, "seconds / not private", groups, reference=1.0)


def main(options: ModelOptions) -> None:
    """Measure, print and keep the figures."""
    require_opacus()
    console, machine = start_benchmark(options, PACKAGES)
    repetitions = 2 if options.quick else options.repetitions
    models: dict[str, Any] = {}
    with quiet_hooks():
        for name in dict.fromkeys((TINY, options.model)):
            bench = open_bench(name, options.device, options.targets, options.seed, repetitions)
            models[name] = measure(bench, quick=options.quick)
            show(console, name, models[name])
    if options.plot:
        plot(options.plot, options.model, models[options.model])
    settings = {
        "seed": options.seed,
        "repetitions": repetitions,
        "targets": options.targets,
        "steps": STEPS,
        "dtype": str(bench.engine.base.dtype).removeprefix("torch."),
        "token_budget": bench.engine.token_budget,
    }
    figures = {"environment": machine, "settings": settings, "models": models}
    goals = goals_of(models[options.model])
    publish(options, "bench_dp", figures, goals)
