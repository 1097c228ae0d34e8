"""Many clients in one pass compared with one after another, and where the token budget stands.

Both train the same jobs on the same engine and resident base model: `fused` hands them over together, and the
engine fills passes up to its token budget; `alone` hands over one at a time. Their deltas must agree before
anything is timed, and again every time. A client step of n tokens is one row, or rows of 100 tokens where it
is longer; a quarter of the tokens are learnt. Tokens are random: what they say costs nothing.

The token budget is varied at fixed work: 16 clients whose steps would fill the largest budget in one pass.
The share of the limit is the useful arithmetic of that work at the rate of the fastest pass of `linear`
through the model's own weights.

    python -m scripts.benchmarks fused --quick --json

Seconds are CPU seconds on a CPU, the clock's on a GPU, where the base model is bfloat16 and the budget is
measured. A CPU is bound by arithmetic, which fusing does not save: there the ratio has no goal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedllm.adapters.layout import initial_adapter
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.engine.passes import packed
from fedllm.seeds import derive_seed
from scripts.benchmarks.agreement import TOLERANCES, compare
from scripts.benchmarks.arithmetic import gemm_rate, trunk_weights, useful_flop
from scripts.benchmarks.models import REAL, TINY, bench_engine, plain_training, random_rows, vocabulary_of
from scripts.benchmarks.options import ModelOptions, start_benchmark
from scripts.charts import lines
from scripts.reports import Goal, Spread, figures_table, megabytes, publish, spread

FUSED, ALONE = "fused", "alone"
PACKAGES = ("fedllm", "torch", "transformers")
CLIENTS = (1, 2, 4, 8, 16, 32)
STEP_TOKENS = (25, 50, 100, 200, 400)
QUICK_CELLS = {25: (1, 8), 200: (2,)}
LONGEST_ROW = 100
LEARNT_SHARE = 0.25
MOST_PASSES = 4  # of a step: cells that need more repeat the passes of smaller ones
CPU_BUDGETS = (128, 256, 512, 1024, 2048)
BUDGET_CLIENTS, BUDGET_ROW = 16, 128
PEAK_TOKENS = {"cpu": (512,), "cuda": (4096, 16384)}  # rows of the peak GEMM: more of them change little

GOAL_SHARE_CPU = 0.85
GOAL_SHARE_GPU = {REAL: 0.35, "random-1.5b": 0.5}
GOAL_FUSED_GPU, GOAL_CELL = 5.0, (8, 200)


@dataclass(frozen=True, eq=False)
class Bench:
    """What every measurement shares."""

    name: str
    engine: Engine
    seed: int
    repetitions: int

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.engine.base.device


def open_bench(name: str, device: str, targets: str, seed: int, repetitions: int) -> Bench:
    """Return the resident base model and an engine on it, warm."""
    engine = bench_engine(name, device, targets)
    bench = Bench(name, engine, seed, repetitions)
    train_fused(engine, make_jobs(bench, 2, (16,)))
    return bench


def row_lengths(num_tokens: int) -> tuple[int, ...]:
    """Return the rows of a client step of so many tokens: one, or as many of LONGEST_ROW as it takes."""
    whole, rest = divmod(num_tokens, LONGEST_ROW)
    return (LONGEST_ROW,) * whole + ((rest,) if rest else ())


def make_jobs(bench: Bench, num_clients: int, lengths: Sequence[int], steps: int = 1) -> list[Job]:
    """Return clients with rows and starts of their own: adapters as they are after some rounds."""
    layout, vocabulary = bench.engine.layout, vocabulary_of(bench.engine.base)
    training = plain_training(steps, len(lengths))
    jobs = []
    for client in range(num_clients):
        seed = derive_seed(bench.seed, "bench-fused", str(client))
        generator = torch.Generator().manual_seed(seed)
        start = initial_adapter(layout, bench.seed).vector
        start = start + 0.01 * torch.randn(layout.size, generator=generator)
        batches = tuple(
            random_rows(lengths, vocabulary, derive_seed(seed, str(step)), LEARNT_SHARE)
            for step in range(steps)
        )
        jobs.append(Job(str(client), start, batches, training))
    return jobs


def train_fused(engine: Engine, jobs: Sequence[Job]) -> torch.Tensor:
    """Return the deltas [C, P] of clients handed over together."""
    return torch.stack([result.delta for result in engine.train(jobs)])


def train_alone(engine: Engine, jobs: Sequence[Job]) -> torch.Tensor:
    """Return the deltas [C, P] of clients handed over one at a time."""
    return torch.stack([result.delta for job in jobs for result in engine.train([job])])


def train_with_budget(engine: Engine, jobs: Sequence[Job], token_budget: int) -> torch.Tensor:
    """Return the deltas [C, P] of clients handed over together, with another token budget."""
    own = engine.token_budget
    engine.token_budget = token_budget
    try:
        return train_fused(engine, jobs)
    finally:
        engine.token_budget = own


def cells(token_budget: int, *, quick: bool) -> dict[int, tuple[int, ...]]:
    """Return which numbers of clients are measured, by tokens of a client step."""
    if quick:
        return QUICK_CELLS
    most = MOST_PASSES * token_budget
    return {size: tuple(k for k in CLIENTS if k * size <= most) for size in STEP_TOKENS}


def measure_cell(bench: Bench, num_clients: int, num_tokens: int) -> dict[str, Any]:
    """Return what fusing so many clients gives, with two steps each.

    Raises:
        RuntimeError: the clients did not get the same deltas as alone.
    """
    engine, jobs = bench.engine, make_jobs(bench, num_clients, row_lengths(num_tokens), steps=2)
    compared = compare(
        {ALONE: lambda: train_alone(engine, jobs), FUSED: lambda: train_fused(engine, jobs)},
        bench.device,
        bench.repetitions,
        TOLERANCES[engine.base.dtype],
    )
    together = packed(jobs, [num_tokens] * num_clients, engine.token_budget)
    return {
        "clients_in_a_pass": len(next(together)),
        "delta_difference": compared.difference,
        "alone_over_fused": compared.ratio(ALONE, FUSED),
        **{name: compared.figures(name) for name in (ALONE, FUSED)},
    }


def budgets_of(bench: Bench, *, quick: bool) -> tuple[int, ...]:
    """Return the token budgets to compare, the engine's own among them."""
    own = bench.engine.token_budget
    if bench.device.type == "cuda":  # none above its own, which may be all that memory holds
        return tuple(max(1, own // part) for part in ((4, 1) if quick else (8, 4, 2, 1)))
    if quick:
        return (128, own) if bench.name != TINY else (128, own, 2048)
    return CPU_BUDGETS


def measure_budgets(bench: Bench, budgets: Sequence[int], num_clients: int) -> dict[str, Any]:
    """Return what passes of every size cost on the same work of one step.

    Raises:
        RuntimeError: another budget gave other deltas.
    """
    engine = bench.engine
    rows = max(1, max(budgets) // (num_clients * BUDGET_ROW))
    jobs = make_jobs(bench, num_clients, (BUDGET_ROW,) * rows)
    weights = list(trunk_weights(engine.base.model).values())
    peaks: list[float] = []

    def measure_peak() -> None:
        for _ in range(2):
            peaks.extend(gemm_rate(weights, size) for size in PEAK_TOKENS[bench.device.type])

    compared = compare(
        {str(budget): _budgeted(engine, jobs, budget) for budget in budgets},
        bench.device,
        bench.repetitions,
        TOLERANCES[engine.base.dtype],
        between=measure_peak,
    )
    all_rows = [row for job in jobs for batch in job.batches for row in batch]
    least = useful_flop(engine.base.model, engine.layout, all_rows) / max(peaks)
    num_tokens = sum(len(row.tokens) for row in all_rows)
    own = str(engine.token_budget)
    return {
        "tokens": num_tokens,
        "peak_gflop_per_s": max(peaks) / 1e9,
        "delta_difference": compared.difference,
        "budgets": {
            name: {
                "tokens_per_s": spread([num_tokens / seconds for seconds in compared.seconds(name)]),
                "share_of_limit": spread([least / seconds for seconds in compared.seconds(name)]),
                "seconds_over_own": compared.ratio(name, own),
                **compared.figures(name),
            }
            for name in compared.timings
        },
    }


def _budgeted(engine: Engine, jobs: Sequence[Job], budget: int) -> Any:
    return lambda: train_with_budget(engine, jobs, budget)


def measure(bench: Bench, *, quick: bool) -> dict[str, Any]:
    """Return everything that is measured on one base model, as the report keeps it."""
    engine = bench.engine
    sizes = cells(engine.token_budget, quick=quick)
    few = quick and bench.name != TINY
    return {
        "token_budget": engine.token_budget,
        "dtype": str(engine.base.dtype).removeprefix("torch."),
        "adapter_values": engine.layout.size,
        "cells": {
            str(size): {str(k): measure_cell(bench, k, size) for k in numbers}
            for size, numbers in sizes.items()
        },
        "budget": measure_budgets(bench, budgets_of(bench, quick=quick), 4 if few else BUDGET_CLIENTS),
    }


def goals_of(name: str, device: torch.device, figures: Mapping[str, Any]) -> dict[str, Goal]:
    """Return what the figures of one base model are judged by: the tiny one's by nothing."""
    if name == TINY:
        return {}
    share = figures["budget"]["budgets"][str(figures["token_budget"])]["share_of_limit"].median
    if device.type != "cuda":
        return {"share_of_gemm_limit": Goal(share, GOAL_SHARE_CPU)}
    goals = {}
    if name in GOAL_SHARE_GPU:
        goals["share_of_gemm_limit"] = Goal(share, GOAL_SHARE_GPU[name])
    clients, size = GOAL_CELL
    cell = figures["cells"].get(str(size), {}).get(str(clients))
    if cell is not None:
        goals["fused_8_over_alone_at_200_tokens"] = Goal(cell["alone_over_fused"].median, GOAL_FUSED_GPU)
    return goals


def show(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    """Print one base model's tables."""
    console.print(
        f"\n{name} in {figures['dtype']}, {figures['adapter_values']} adapter values, token budget"
        f" {figures['token_budget']}",
        soft_wrap=True,
    )
    numbers = sorted({int(k) for row in figures["cells"].values() for k in row})
    ratio = {
        f"{size} tokens": [_cell_text(row.get(str(k))) for k in numbers]
        for size, row in figures["cells"].items()
    }
    title = "seconds alone over fused (min median max), clients in a pass; by tokens of a client step"
    console.print(figures_table(title, [f"K = {k}" for k in numbers], ratio))
    memory = {
        f"{size} tokens": [_memory_text(row.get(str(k))) for k in numbers]
        for size, row in figures["cells"].items()
    }
    console.print(figures_table("peak MB alone, fused", [f"K = {k}" for k in numbers], memory))
    budgets = figures["budget"]["budgets"]
    rows = {
        "tokens per s": [one["tokens_per_s"].text(0) for one in budgets.values()],
        "share of limit": [one["share_of_limit"].text() for one in budgets.values()],
        "seconds over own budget's": [one["seconds_over_own"].text() for one in budgets.values()],
        "peak MB": [megabytes(one["peak_bytes"]) for one in budgets.values()],
    }
    title = f"by token budget, {figures['budget']['tokens']} tokens of work (min median max)"
    console.print(figures_table(title, tuple(budgets), rows))


def _cell_text(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else f"{cell['alone_over_fused'].text()}, {cell['clients_in_a_pass']}"


def _memory_text(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    return ", ".join(megabytes(cell[name]["peak_bytes"]) for name in (ALONE, FUSED))


def plot(path: Path, name: str, figures: Mapping[str, Any]) -> None:
    """Draw how much fusing saves by the number of clients, a line for each size of a client step."""
    series: dict[str, list[tuple[float | str, Spread]]] = {
        f"{size} tokens a client step": [(float(k), cell["alone_over_fused"]) for k, cell in row.items()]
        for size, row in figures["cells"].items()
    }
    title = f"{name}: clients fused, up to {figures['token_budget']} tokens a pass"
    label = "seconds one after another / fused"
    lines(path, title, "clients", label, series, log_x=True, reference=1.0)


def main(options: ModelOptions) -> None:
    """Measure, print and keep the figures."""
    console, machine = start_benchmark(options, PACKAGES)
    repetitions = 2 if options.quick else options.repetitions
    models: dict[str, Any] = {}
    goals: dict[str, Goal] = {}
    for name in dict.fromkeys((TINY, options.model)):
        bench = open_bench(name, options.device, options.targets, options.seed, repetitions)
        models[name] = measure(bench, quick=options.quick)
        goals = goals_of(name, bench.device, models[name])
        show(console, name, models[name])
    if options.plot:
        plot(options.plot, options.model, models[options.model])
    settings = {"seed": options.seed, "repetitions": repetitions, "targets": options.targets}
    figures = {"environment": machine, "settings": settings, "models": models}
    publish(options, "bench_fused", figures, goals)
