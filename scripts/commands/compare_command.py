"""`fedllm compare`: two runs side by side, and whether they gave the same adapter."""

import json
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from fedllm.adapters.folder import load_adapter
from fedllm.runs.folder import read_keys
from scripts.console import Console

_UNIMPORTANT = {"run.name", "run.output", "run.resume"}


def compare(first: Path, second: Path, *, assert_equal: bool, as_json: bool) -> None:
    """Print how two runs differ; with `assert_equal` exit 1 unless their adapters are equal bit for bit."""
    report = differences(first, second)
    if as_json:
        print(json.dumps(report))
    else:
        _print(Console(), first, second, report)
    if assert_equal and not report["adapter"]["equal"]:
        raise typer.Exit(1)


def differences(first: Path, second: Path) -> dict[str, Any]:
    """Return what differs between two run folders: configuration keys, held-out losses, adapter values."""
    configs = [read_keys(folder) for folder in (first, second)]
    keys = sorted((configs[0].keys() | configs[1].keys()) - _UNIMPORTANT)
    changed = {
        key: [c.get(key) for c in configs] for key in keys if configs[0].get(key) != configs[1].get(key)
    }
    states = [load_adapter(folder / "adapter").state for folder in (first, second)]
    same_layout = states[0].layout == states[1].layout
    adapter: dict[str, Any] = {"equal": states[0].digest == states[1].digest, "same_layout": same_layout}
    if same_layout:
        gap = states[0].vector - states[1].vector
        adapter["largest_difference"] = float(gap.abs().max())
        adapter["relative_difference"] = float(gap.norm() / states[0].vector.norm())
    return {
        "config": changed,
        "held_out": [_held_out(folder) for folder in (first, second)],
        "adapter": adapter,
    }


def _held_out(folder: Path) -> float | None:
    try:
        result = json.loads((folder / "result.json").read_text())
        return float(result["held_out"]["after"]["mean"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _print(console: Console, first: Path, second: Path, report: dict[str, Any]) -> None:
    table = Table("", str(first), str(second), box=None, header_style="bold", pad_edge=False)
    for key, values in report["config"].items():
        table.add_row(key, *(repr(value) for value in values))
    losses = ["-" if loss is None else f"{loss:.4f}" for loss in report["held_out"]]
    table.add_row("mean held-out loss", *losses)
    console.rich.print(table)
    adapter = report["adapter"]
    if adapter["equal"]:
        console.line("adapters are equal, bit for bit")
    elif not adapter["same_layout"]:
        console.line("adapters differ in layout or base model")
    else:
        console.line(
            f"adapters differ by at most {adapter['largest_difference']:.3g}"
            f" ({adapter['relative_difference']:.3g} of the first's norm)"
        )
