"""Choices scored by likelihood compared with lm-evaluation-harness, on the same items and the same model.

Both compute in float32 on one resident base model, in turn. The harness runs as it comes, one row at a time,
and in batches of eight; the goal is against the faster. With --double both compute in float64, where their
log-likelihoods must agree to 1e-6 nats.

    python -m scripts.benchmarks evaluation --quick --json
    python -m scripts.benchmarks evaluation --tasks FOLDER --limit 50

Without `--tasks` the items are made of docstrings of installed packages: which of four sentences is this
function's?
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fedllm.config.keys import LoraConfig
from fedllm.data.demo_corpus import docstring_rows
from fedllm.engine.engine import Engine
from fedllm.errors import MissingExtraError
from fedllm.evaluation.likelihood import choice_rows, score_rows
from fedllm.evaluation.read_items import make_task
from fedllm.evaluation.sources import named_tasks
from fedllm.evaluation.task import Task
from fedllm.models.base import layout_of
from fedllm.models.files import EMBEDDED_ALIAS
from scripts.benchmarks.models import bench_base
from scripts.benchmarks.options import BenchOptions, start_benchmark
from scripts.benchmarks.timing import Timing, alternate
from scripts.reports import Goal, figures_table, publish, ratios, spread

PACKAGES = ("fedllm", "torch", "transformers", "lm_eval")
BATCHES = (1, 8)  # of lm-evaluation-harness
GOAL, GOAL_NATS = 2.0, 1e-6  # its seconds over ours; the largest difference in float64
NUM_CHOICES = 4


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """Options of this benchmark."""

    model: Annotated[str, typer.Option(help="The base model.")] = EMBEDDED_ALIAS
    tasks: Annotated[str, typer.Option(help="As of fedllm evaluate; without, docstrings.")] = ""
    limit: Annotated[int, typer.Option(min=2, help="Items of each task.")] = 50
    double: Annotated[bool, typer.Option("--double", help="Compute in float64.")] = False


def docstring_task(limit: int) -> Task:
    """Return questions whose right choice is a function's docstring, and whose others are its neighbours'."""
    rows = docstring_rows(8)[: limit + NUM_CHOICES]
    items = []
    for place in range(min(limit, len(rows) - NUM_CHOICES)):
        right = place % NUM_CHOICES
        sentences = [row["response"] for row in rows[place : place + NUM_CHOICES]]
        sentences[0], sentences[right] = sentences[right], sentences[0]
        items.append({"question": rows[place]["prompt"], "choices": sentences, "answer": right})
    return make_task("docstrings", items)


def score_with_fedllm(engine: Engine, task: Task) -> list[float]:
    """Return the log-likelihood of every choice, tokenising included."""
    groups = [choice_rows(engine.base, item.prompt, item.choices) for item in task.items]
    (found,) = score_rows(engine, [torch.zeros(engine.layout.size)], groups)
    return [row.log_likelihood for rows in found for row in rows]


def score_with_harness(engine: Engine, task: Task, batch_size: int) -> list[float]:
    """Return what lm-evaluation-harness's own model class gives for the same prompts and choices."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    base = engine.base
    model = HFLM(base.model, tokenizer=base.tokenizer, batch_size=batch_size, device=str(base.device))
    pairs = [(item.prompt.text, f" {choice}") for item in task.items for choice in item.choices]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    return [answer for answer, _ in model.loglikelihood(requests, disable_tqdm=True)]


def measure(engine: Engine, task: Task, repetitions: int) -> dict[str, Any]:
    """Return seconds of ours and the harness's on a task, and by how much their figures differ."""
    works = {"fedllm": partial(score_with_fedllm, engine, task)}
    for size in BATCHES:
        works[f"lm_eval, {size} at once"] = partial(score_with_harness, engine, task, size)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    values: dict[str, list[float]] = {}
    for measured in alternate(works, repetitions):
        for name, one in measured.items():
            timing: Timing = one.timing
            seconds[name].append(timing.busy(engine.base.device))
            values[name] = one.value
    peers = [name for name in works if name != "fedllm"]
    over = {name: ratios(seconds[name], seconds["fedllm"]) for name in peers}
    pairs = [(a, b) for name in peers for a, b in zip(values["fedllm"], values[name], strict=True)]
    return {
        "items": len(task.items),
        "seconds": {name: spread(each) for name, each in seconds.items()},
        "over_ours": over,
        "faster_peer_over_ours": min(ratio.median for ratio in over.values()),
        "largest_difference_nats": max(abs(a - b) for a, b in pairs),
    }


def show(console: Console, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print seconds and quotients of every task."""
    names = list(next(iter(figures.values()))["seconds"])
    rows: dict[str, Sequence[str]] = {
        name: [
            *(row["seconds"][variant].text() for variant in names),
            *(row["over_ours"][variant].text() for variant in names[1:]),
        ]
        for name, row in figures.items()
    }
    columns = (*(f"{name}, s" for name in names), *(f"{name} / ours" for name in names[1:]))
    console.print("\n", figures_table("min, median and max over the repetitions", columns, rows))


def main(options: Options) -> None:
    """Measure, print and keep the figures.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "this benchmark needs lm-evaluation-harness: pip install 'fedllm[eval]'"
        ) from None
    console, machine = start_benchmark(options, PACKAGES)
    repetitions, limit = (1, 6) if options.quick else (options.repetitions, options.limit)
    base = bench_base(options.model, options.device)
    if options.double:
        base.model.double()
    engine = Engine(base, layout_of(base.model, LoraConfig(rank=1), base.fingerprint))
    tasks = named_tasks(options.tasks, limit=limit) if options.tasks else [docstring_task(limit)]
    tasks = [task for task in tasks if task.kind == "choice"]
    score_with_fedllm(engine, tasks[0])  # warm
    figures = {task.name: measure(engine, task, repetitions) for task in tasks}
    show(console, figures)
    total = dict.fromkeys(next(iter(figures.values()))["seconds"], 0.0)
    for row in figures.values():
        for name, each in row["seconds"].items():
            total[name] += each.median
    ours = total.pop("fedllm")
    goals = {"lm_eval_over_ours_all_tasks": Goal(min(total.values()) / ours, GOAL)}
    if options.double:
        largest = max(row["largest_difference_nats"] for row in figures.values())
        goals["largest_difference_nats"] = Goal(largest, GOAL_NATS, at_most=True)
    settings = {
        "repetitions": repetitions,
        "limit": limit,
        "model": options.model,
        "double": options.double,
    }
    report = {"environment": machine, "settings": settings, "tasks": figures}
    publish(options, "bench_evaluation", report, goals)
