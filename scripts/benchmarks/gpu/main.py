"""Everything that the project promises of a GPU, in one go: one table, one JSON object.

Each part is a process of its own with a time limit, so that one which fails or hangs costs nothing but its
own rows. Training steps need no model on disk: random weights of the same shapes cost the same. Where the
embedded model is absent, clients, rounds and runs have a random one of its size, made here.

    python -m scripts.benchmarks gpu --json                     # on a GPU, under 8 minutes
    python -m scripts.benchmarks gpu --quick --json             # a tiny model, also on a CPU
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fedllm.models.base import choose_device
from fedllm.models.files import embedded_gguf
from scripts.benchmarks.gpu.clients import measure_clients, measure_generation
from scripts.benchmarks.gpu.runs import measure_demo, measure_rounds, measure_thousand
from scripts.benchmarks.gpu.steps import measure_privacy, measure_steps
from scripts.benchmarks.models import LARGE, REAL, SMALL, TINY, save_random_model, save_tiny_model
from scripts.benchmarks.options import BenchOptions, start_benchmark
from scripts.charts import Plot, bars
from scripts.reports import Goal, Spread, figures_table, publish

PACKAGES = ("fedllm", "torch", "transformers", "peft")
SMALL_STEPS = {
    (8192, 8): "8,192 tokens, 8 clients",
    (2048, 8): "2,048 tokens, 8 clients",
    (32768, 64): "32,768 tokens, 64 clients",
}
LARGE_STEPS = {(8192, 8): "8,192 tokens, 8 clients"}
QUICK_STEPS = {(800, 2): "800 tokens, 2 clients"}
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """What can be asked for; --quick is a tiny model and little work, and judges nothing."""

    part: Annotated[str, typer.Option(help="One part alone, in this process.")] = ""
    model: Annotated[str, typer.Option(help="Of clients, rounds and runs; empty = the embedded one.")] = ""
    plot: Plot = None


@dataclass(frozen=True)
class Part:
    """One process's work: what it measures, given the model on disk, and how long it may take."""

    measure: Callable[[str], dict[str, Any]]
    limit_s: float


def parts_of(device: str, *, quick: bool) -> dict[str, Part]:
    """Return all parts by name, in the order they are done in."""
    small, large = (TINY, TINY) if quick else (SMALL, LARGE)

    def with_model(measure: Callable[..., dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
        return lambda model: measure(model, device, quick=quick)

    return {
        "steps, 135M": Part(
            lambda _: measure_steps(small, QUICK_STEPS if quick else SMALL_STEPS, device, quick=quick), 70
        ),
        "steps, 1.5B": Part(
            lambda _: measure_steps(large, QUICK_STEPS if quick else LARGE_STEPS, device, quick=quick), 60
        ),
        "private": Part(lambda _: measure_privacy((small, large), device, quick=quick), 60),
        "clients": Part(with_model(measure_clients), 70),
        "generation": Part(with_model(measure_generation), 40),
        "rounds": Part(with_model(measure_rounds), 60),
        "thousand": Part(with_model(measure_thousand), 60),
        "demo": Part(with_model(measure_demo), 60),
    }


def run_parts(options: Options, model: str, console: Console) -> dict[str, Any]:
    """Return every part's figures; where one failed, its one line of why under "error"."""
    found: dict[str, Any] = {}
    for name, part in parts_of(options.device, quick=options.quick).items():
        began = time.perf_counter()
        found[name] = _in_process(name, part, options, model)
        line = found[name].get("error", "done")
        console.print(f"{name}: {line} ({time.perf_counter() - began:.0f} s)")
    return found


def _in_process(name: str, part: Part, options: Options, model: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.benchmarks", "gpu", "--part", name, "--json"]
    command += ["--device", options.device, "--model", model, "--threads", str(options.threads)]
    command += ["--quick"] if options.quick else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=part.limit_s)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {part.limit_s:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        return {"error": f"ended with {done.returncode}: {last[:300]}"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["figures"]
    return figures


@contextmanager
def model_on_disk(name: str, *, quick: bool) -> Iterator[str]:
    """Yield the model to train and run: the one named, the embedded one, or a random one made for now."""
    if name or (embedded_gguf() is not None and not quick):
        yield name or REAL
        return
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as folder:
        made = save_tiny_model(Path(folder)) if quick else save_random_model(Path(folder), SMALL)
        yield str(made)


# The goals: title, part, where its figure is, the goal, and whether it is a ceiling.
GOALS: tuple[tuple[str, str, tuple[str, ...], float, bool], ...] = (
    ("135M_8192_tokens_ms", "steps, 135M", (SMALL_STEPS[8192, 8], "ms", "median"), 24.0, True),
    ("135M_2048_tokens_ms", "steps, 135M", (SMALL_STEPS[2048, 8], "ms", "median"), 9.0, True),
    ("135M_32768_tokens_share", "steps, 135M", (SMALL_STEPS[32768, 64], "share_of_peak"), 0.25, False),
    ("1.5B_8192_tokens_share", "steps, 1.5B", (LARGE_STEPS[8192, 8], "share_of_peak"), 0.5, False),
    ("times_faster_than_flowertune", "clients", ("times_faster_than", "FlowerTune", "median"), 40.0, False),
    ("times_faster_than_trl", "clients", ("times_faster_than", "TRL", "median"), 5.0, False),
    ("private_over_not_135M", "private", (SMALL, "median"), 1.06, True),
    ("private_over_not_1.5B", "private", (LARGE, "median"), 1.06, True),
    ("round_over_bare_engine", "rounds", ("over_bare", "median"), 1.10, True),
    ("demo_s", "demo", ("s", "median"), 15.0, True),
    ("thousand_clients_round_s", "thousand", ("round_s", "median"), 30.0, True),
    ("generation_256_texts_s", "generation", ("s", "median"), 5.0, True),
)


def goals_of(found: Mapping[str, Any]) -> dict[str, Goal]:
    """Return every goal with what was measured; what failed is judged as not reached."""
    goals = {}
    for title, part, path, goal, at_most in GOALS:
        value: Any = found.get(part, {})
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        missing = float("inf") if at_most else 0.0
        goals[title] = Goal(float(value) if isinstance(value, int | float) else missing, goal, at_most)
    return goals


def show(console: Console, found: Mapping[str, Any], goals: Mapping[str, Goal]) -> None:
    """Print one table: every goal, or where nothing is judged every part's figures."""
    if goals:
        rows = {
            title: [f"{goal.value:.3g}", f"{'<=' if goal.at_most else '>='} {goal.goal:g}", _met(goal)]
            for title, goal in goals.items()
        }
        console.print(figures_table("one GPU", ("measured", "goal", ""), rows))
    figures = {": ".join(path): [text] for path, text in _figures((), found)}
    console.print(figures_table("figures of every part (min, median and max)", ("",), figures))


def _figures(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every figure with the names that lead to it; a spread is one figure."""
    if isinstance(value, Mapping) and value.keys() != {"min", "median", "max"}:
        for name, part in value.items():
            yield from _figures((*path, name), part)
    elif isinstance(value, Mapping):
        yield path, "  ".join(f"{number:.4g}" for number in value.values())
    else:
        yield path, f"{value:.4g}" if isinstance(value, float) else str(value)


def _met(goal: Goal) -> str:
    return "met" if goal.met else "missed"


def draw(path: Path, goals: Mapping[str, Goal]) -> None:
    """Draw every measured figure over its goal: below 1 is better, whichever way the goal points."""
    over = {
        title: goal.value / goal.goal if goal.at_most else goal.goal / goal.value
        for title, goal in goals.items()
        if 0 < goal.value < float("inf")
    }
    groups = {title: {"measured": Spread(value, value, value)} for title, value in over.items()}
    bars(
        path,
        "One GPU: how far each figure is from its goal",
        "of the goal; below 1 is met",
        groups,
        reference=1.0,
    )


def main(options: Options) -> None:
    """Measure one part, or all of them; print and keep the figures."""
    console, machine = start_benchmark(options, PACKAGES)
    choose_device(options.device)  # named wrongly it fails at once
    if options.part:
        part = parts_of(options.device, quick=options.quick)[options.part]
        publish(options, f"bench_gpu, {options.part}", part.measure(options.model), {})
        return
    with model_on_disk(options.model, quick=options.quick) as model:
        found = run_parts(options, model, console)
    is_judged = not options.quick and torch.cuda.is_available() and options.device != "cpu"
    goals = goals_of(found) if is_judged else {}
    show(console, found, goals)
    if options.plot and goals:
        draw(options.plot, goals)
    publish(options, "bench_gpu", {"environment": machine, "parts": found}, goals)
