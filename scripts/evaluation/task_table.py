"""Tasks under several adapters: measured engine by engine, shown as a table."""

from collections.abc import Sequence

from rich.table import Table

from fedllm.evaluation.flowertune import FIGURE
from fedllm.evaluation.intervals import Estimate
from fedllm.evaluation.score import TaskResult, compare, measure
from fedllm.evaluation.task import Scores, Task
from scripts.console import Console
from scripts.evaluation.columns import Column, by_engine

_NATS = ("loss", "bits-per-byte")  # figures that are no shares


def evaluate_tasks(
    columns: Sequence[Column], tasks: Sequence[Task], *, with_flowertune: bool, max_new_tokens: int
) -> list[TaskResult]:
    """Return what all columns give on each task."""
    scores: list[dict[str, Scores]] = [{} for _ in tasks]
    for engine, adapters in by_engine(columns):
        for task, found in zip(tasks, scores, strict=True):
            found |= measure(
                engine, adapters, task, with_flowertune=with_flowertune, max_new_tokens=max_new_tokens
            )
    order = [column.name for column in columns]
    return [
        compare(task, {name: found[name] for name in order})
        for task, found in zip(tasks, scores, strict=True)
    ]


def show_tasks(console: Console, results: Sequence[TaskResult]) -> None:
    """Print each task: a line for each figure and adapter, with its interval and how it differs."""
    first = next(iter(results[0].adapters))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("task", "adapter"):
        table.add_column(heading, overflow="ellipsis")
    for heading in ("value", "95 % interval", f"more than {first}"):
        table.add_column(heading, no_wrap=True)
    for result in results:
        task = result.task
        guesses = {"by chance": task.chance, "by one answer": task.best_constant}
        table.add_row(f"{task.name}, {len(task.items)} items", style="bold")
        for what, share in guesses.items():
            if share:
                table.add_row("  " + what, "", f"{100 * share:.1f}", style="dim")
        for figure in result.adapters[first].figures:
            for place, (name, adapter) in enumerate(result.adapters.items()):
                changed = adapter.differences.get(figure)
                cells = [*_cells(adapter.figures[figure], figure), ""]
                if changed is not None:
                    cells[2] = " ".join(_cells(changed, figure, sign="+"))
                table.add_row("" if place else f"  {figure}", name, *cells)
    console.rich.print(table)
    if any(FIGURE in adapter.figures for result in results for adapter in result.adapters.values()):
        console.line(
            f"{FIGURE}: the first letter of one token, for comparison with FlowerTune's figures only"
        )


def _cells(found: Estimate, figure: str, sign: str = "") -> list[str]:
    """Return a figure and its interval as text, shares in per cent."""
    scale, digits = (1.0, 3) if figure in _NATS else (100.0, 1)
    value, low, high = (f"{scale * part:{sign}.{digits}f}" for part in (found.value, found.low, found.high))
    return [value, f"[{low}, {high}]"]
