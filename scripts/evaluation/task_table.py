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
_LABELS = {FIGURE: "FlowerTune's rule, for comparison only"}


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
    """Print a line for each figure: each adapter's with its interval, and its difference to the first."""
    names = list(results[0].adapters)
    console.line(f"figures with 95 % intervals; differences are to {names[0]}, item by item")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("task")
    for heading in ("items", "chance", "constant", "figure"):
        table.add_column(heading, no_wrap=True)
    for name in names:
        table.add_column(name, overflow="ellipsis")
        if name != names[0]:
            table.add_column("difference")
    for result in results:
        for figure in result.adapters[names[0]].figures:
            table.add_row(*_row(result, figure))
    console.rich.print(table)


def _row(result: TaskResult, figure: str) -> list[str]:
    task, adapters = result.task, result.adapters
    is_first = figure == next(iter(next(iter(adapters.values())).figures))
    head = [task.name, str(len(task.items)), _percent(task.chance), _percent(task.best_constant)]
    cells = head if is_first else [""] * len(head)
    cells.append(_LABELS.get(figure, figure))
    for adapter in adapters.values():
        cells.append(_cell(adapter.figures[figure], figure))
        if figure in adapter.differences:
            cells.append(_cell(adapter.differences[figure], figure, sign="+"))
    return cells


def _cell(found: Estimate, figure: str, sign: str = "") -> str:
    scale, digits = (1.0, 3) if figure in _NATS else (100.0, 1)
    value, low, high = (f"{scale * part:{sign}.{digits}f}" for part in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
