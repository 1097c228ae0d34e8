"""A thin call of lm-evaluation-harness: its own model class, its own tasks, its own figures."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from fedllm.adapters.folder import load_adapter
from fedllm.errors import ConfigError, MissingExtraError
from fedllm.models.base import choose_device
from fedllm.models.files import first_line, resolve_model
from scripts.console import Console
from scripts.evaluation.columns import holds_adapter
from scripts.finished_run import adapter_of, bare_config


def run_harness(targets: Sequence[str], tasks: str, *, limit: int | None, console: Console) -> dict[str, Any]:
    """Return lm-evaluation-harness's figures of each target on its `tasks`, once they are shown.

    Raises:
        MissingExtraError: it is not installed.
        ConfigError: it knows no such task, or cannot get its rows.
    """
    try:
        import lm_eval
    except ImportError:
        raise MissingExtraError("--harness needs lm-evaluation-harness: pip install 'fedllm[eval]'") from None
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = {}
    for target in targets:
        with _model_arguments(target) as arguments:
            try:
                done = lm_eval.simple_evaluate("hf", arguments, names, limit=limit, bootstrap_iters=0)
            except (OSError, ValueError, KeyError, RuntimeError) as error:  # no such task, or no hub
                raise ConfigError(f"--harness {tasks}: {first_line(error)}") from None
        found[target] = {
            name: {key: value for key, value in figures.items() if _is_figure(value)}
            for name, figures in done["results"].items()
        }
    if not console.quiet:
        _show(console, found)
    return {"harness": {"version": lm_eval.__version__, "results": found}}


@contextmanager
def _model_arguments(target: str) -> Iterator[dict[str, Any]]:
    """Yield what the harness's model class is given: a base model, and an adapter's folder if any."""
    if not holds_adapter(target):
        yield {"pretrained": str(resolve_model(target).folder), "device": str(choose_device("auto"))}
        return
    with adapter_of(Path(target)) as found:
        published = load_adapter(found.folder)  # PEFT itself asks for neither digests nor signature
        model = (found.config or bare_config(published)).model
        base, device = resolve_model(model.name).folder, choose_device(model.device)
        yield {"pretrained": str(base), "peft": str(found.folder.resolve()), "device": str(device)}


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _show(console: Console, found: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("target", "task", "figure", "value"):
        table.add_column(heading)
    for target, tasks in found.items():
        for task, figures in tasks.items():
            for figure, value in figures.items():
                table.add_row(target, task, figure, f"{value:.4f}")
    console.rich.print(table)
