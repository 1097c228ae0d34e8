"""`fedllm evaluate`: tasks, clients' held-out rows, or a matrix of both, under base models and adapters."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError, NoDataError
from fedllm.evaluation.sources import named_tasks, suite_tasks
from fedllm.evaluation.task import Task
from scripts.console import Console
from scripts.evaluation.client_losses import evaluate_clients, held_out_rows
from scripts.evaluation.columns import Column, holds_adapter, open_columns
from scripts.evaluation.kept import keep, may_keep_losses
from scripts.evaluation.matrix import evaluate_matrix, matrix_report, own_adapters, show_matrix
from scripts.evaluation.task_table import evaluate_tasks, show_tasks


@dataclass(frozen=True)
class Wanted:
    """What is to be measured; see the options of `fedllm evaluate`."""

    data: str = ""
    tasks: str = ""
    suite: str = ""
    split: str = "test"
    limit: int | None = None
    matrix: bool = False
    harness: str = ""
    flowertune: bool = False
    max_new_tokens: int = 256


def evaluate(targets: Sequence[str], wanted: Wanted, *, as_json: bool) -> None:
    """Measure what is wanted of each target and print it; a run's folder keeps it too.

    Raises:
        FedLLMError: a target, a task or the rows cannot be used.
    """
    console = Console(quiet=as_json)
    report, is_public = _measured(targets, wanted, console)
    run = Path(targets[0])
    if is_public and (run / "config.toml").is_file():
        keep(run, report)
    if as_json:
        print(json.dumps(report))


def _measured(targets: Sequence[str], wanted: Wanted, console: Console) -> tuple[dict[str, Any], bool]:
    """Return the report, once it is shown, and whether it may stand in the run's folder."""
    if wanted.harness:
        from scripts.evaluation.harness import run_harness

        return run_harness(targets, wanted.harness, limit=wanted.limit, console=console), True
    has_tasks = bool(wanted.tasks or wanted.suite)
    if has_tasks and (wanted.data or wanted.matrix):
        raise ConfigError("--tasks and --suite have rows of their own; --data and --matrix are without them")
    if not has_tasks and not wanted.matrix and len(targets) == 1 and holds_adapter(targets[0]):
        return evaluate_clients(Path(targets[0]), data=wanted.data, console=console)
    tasks = _tasks(wanted, console) if has_tasks else []
    columns = open_columns(targets)
    for column in columns:
        if column.note:
            console.line(column.note)
    if has_tasks:
        return _task_report(columns, tasks, wanted, console), True
    return _matrix_report(columns, wanted.data, console)


def _tasks(wanted: Wanted, console: Console) -> list[Task]:
    if not wanted.suite:
        return named_tasks(wanted.tasks, split=wanted.split, limit=wanted.limit)
    tasks, missing = suite_tasks(wanted.suite, wanted.tasks, limit=wanted.limit)
    if missing:
        console.line(f"{wanted.tasks}: without {', '.join(missing)}, which are left out")
    return tasks


def _task_report(
    columns: Sequence[Column], tasks: Sequence[Task], wanted: Wanted, console: Console
) -> dict[str, Any]:
    results = evaluate_tasks(
        columns, tasks, with_flowertune=wanted.flowertune, max_new_tokens=wanted.max_new_tokens
    )
    if not console.quiet:
        show_tasks(console, results)
    return {"tasks": {result.task.name: result.to_dict() for result in results}}


def _matrix_report(columns: Sequence[Column], data: str, console: Console) -> tuple[dict[str, Any], bool]:
    """Return the losses of the first run's clients, or of the rows `data`, under all columns."""
    run = next((column for column in columns if column.clients is not None), None)
    if run is None and not data:
        raise ConfigError("no run, whose clients have rows, is among them; name --tasks, --suite, or --data")
    config = columns[0].config if run is None else run.config
    clients = held_out_rows(config, data, () if run is None else run.clients or ())
    if not clients:
        raise NoDataError(f"{run.name if run else data}: no held-out rows; give some with --data")
    own = {} if run is None or data else own_adapters(run)
    report = matrix_report(evaluate_matrix(columns, clients, own))
    if not console.quiet:
        show_matrix(console, report)
    return {"matrix": report}, may_keep_losses(config)
