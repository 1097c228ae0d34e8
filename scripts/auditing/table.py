"""What an audit found as one table, on the screen and on the page of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from scripts.auditing.membership import SHOWN

REPORT = "audit.json"  # in the run's folder


def table_of(report: Mapping[str, Any]) -> Table:
    """Return the whole report as one table: a row an attack, a column for the run and for each control."""
    names = ("attack", "this run", "held-out", "base model", "positive control")
    table = Table(*names, box=None, header_style="bold", pad_edge=False)
    for row in _rows(report):
        table.add_row(*row)
    return table


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    kinds = ("run", "held_out", "base", "positive_control")
    for name in SHOWN:
        found = report["membership"][name]
        yield f"AUC, {name}", *(_number(found[kind], "area") for kind in kinds)
        yield "  found at 1 % FPR", *(_share(found[kind], "caught") for kind in kinds)
    taken = report["extraction"]
    yield "texts given back", *(_counted(taken[kind]) for kind in kinds)
    yield "texts nearly repeated", *(_counted(report["near_duplicates"][kind]) for kind in kinds)
    yield from _inversion_rows(report["inversion"])
    yield from _canary_rows(report["canaries"])


def _inversion_rows(inversion: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    if "skipped" in inversion:
        return
    control = inversion["positive_control"]
    for name, found in inversion["run"].items():
        others = inversion["held_out"][name]
        for guess in ("closest", "spanned"):
            cells = (found[guess], others[guess], None, control[guess])
            label = "tokens read" if name == "update" else name
            yield f"{label}, {guess}", *(_number(cell, "f1") for cell in cells)
    for guess in ("closest", "spanned") if "masked" in control else ():
        yield f"control under masks, {guess}", "-", "-", "-", _number(control["masked"][guess], "f1")


def _canary_rows(canaries: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    if "skipped" in canaries:
        return
    control = canaries["positive_control"]
    for repeats, group in canaries["repeats"].items():
        largest = group["run"]["largest_exposure"]
        cells = (group["run"], None, group["base"], control)
        yield (
            f"exposure x {repeats} (max {largest:.1f})",
            *(_number(cell, "mean_exposure") for cell in cells),
        )
        yield (
            f"epsilon x {repeats}, at least",
            *(_number(cell, "epsilon_lower_bound") for cell in cells),
        )


def _number(found: Mapping[str, Any] | None, key: str) -> str:
    return "-" if found is None or found[key] is None else f"{found[key]:.2f}"


def _share(found: Mapping[str, Any] | None, key: str) -> str:
    if found is None:
        return "-"
    return f"{found[key]:.0%} {_bounds(found)}"


def _counted(found: Mapping[str, Any]) -> str:
    if not found["number"]:
        return "none so long"
    return f"{found['extracted']}/{found['number']} {_bounds(found)}"


def _bounds(found: Mapping[str, Any]) -> str:
    return f"({100 * found['low']:.0f}-{100 * found['high']:.0f})"
