"""`fedllm audit`: what attacks learn from a run, and from controls that hide everything or nothing."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from fedllm.errors import CheckpointError
from fedllm.files import write_file
from scripts.auditing.canaries import canary_report
from scripts.auditing.control import overfit
from scripts.auditing.inversion import inversion_report
from scripts.auditing.membership import (
    SHOWN,
    curves,
    extraction_report,
    membership_report,
    null_deviation,
    scored,
)
from scripts.auditing.opening import Case, open_case
from scripts.charts import check_plot, roc_and_bars
from scripts.console import Console, shown_path
from scripts.reports import Spread

REPORT = "audit.json"
NAMES = {
    "run": "this run",
    "positive_control": "positive control",
    "held_out": "held-out control",
}  # in plots
NOTES = (
    "a lower bound is not a guarantee: an attack that finds nothing proves nothing; a better one may find"
    " more",
    "the positive control is one client's text learnt by heart without protection: an audit that finds"
    " nothing there is blind, and its other columns say nothing",
    "membership compares training rows with held-out rows of the same clients; the base column shows whether"
    " they differ by themselves",
    "this report tells of private rows: it stays where they are",
)


def audit(
    target: Path, *, rows: int, prefix: int, suffix: int, epochs: int, plot: Path | None, as_json: bool
) -> None:
    """Audit a run folder: print one table, write audit.json into it and draw a plot where one is wanted.

    Raises:
        FedLLMError: the run, its rows or its base model are not here; a plot is wanted that cannot be drawn.
        CheckpointError: a file cannot be written.
    """
    check_plot(plot)
    with TemporaryDirectory() as scratch:
        case = open_case(target, max_rows=rows, scratch=Path(scratch))
        report, lines = report_of(case, prefix=prefix, suffix=suffix, epochs=epochs)
    try:
        write_file(case.folder / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
        if plot is not None:
            lowest = 0.5 / max(1, report["num_others"], report["num_members"])
            curves = {NAMES[kind]: points for kind, points in lines.items()}
            roc_and_bars(plot, curves, bars_of(report), lowest=lowest)
    except OSError as error:
        raise CheckpointError(f"cannot write {error.filename}: {error.strerror}") from None
    if as_json:
        print(json.dumps(report))
        return
    console = Console()
    console.rich.print(table_of(report))
    for line in _words(case, report):
        console.line(line)


def report_of(
    case: Case, *, prefix: int, suffix: int, epochs: int
) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    """Return the content of audit.json, and the ROC curves that are drawn of it."""
    control = overfit(case, epochs)
    scores = scored(case, control)
    report = {
        "run": case.config.run.name,
        "adapter": case.adapter.digest,
        "num_members": len(case.members),
        "num_others": len(case.others),
        "null_deviation": null_deviation(len(case.members), len(case.others)),
        "membership": membership_report(scores),
        "extraction": extraction_report(case, control, prefix=prefix, suffix=suffix),
        "inversion": inversion_report(case, control),
        "canaries": canary_report(case, control),
        "claim": {key: case.statement[key] for key in ("unit", "trust", "epsilon", "delta")}
        if case.statement
        else None,
        "positive_control": {
            "rank": control.engine.layout.rank,
            "epochs": epochs,
            "num_members": len(control.members),
            "num_others": len(control.others),
            "num_canaries": len(control.canaries),
        },
        "notes": list(NOTES),
    }
    return report, curves(scores)


def bars_of(report: Mapping[str, Any]) -> dict[str, dict[str, Spread]]:
    """Return the numbers from 0 to 1 that are drawn as bars; an attack that was skipped has none."""
    ratio, taken, inversion = report["membership"]["loss-ratio"], report["extraction"], report["inversion"]
    groups = {
        "AUC": {kind: ratio[kind]["area"] for kind in NAMES if ratio[kind]},
        "found at\n1 % FPR": {kind: ratio[kind]["caught"] for kind in NAMES if ratio[kind]},
        "extracted": {kind: taken[kind]["rate"] for kind in NAMES},
    }
    if "skipped" not in inversion:
        groups["tokens\nread (F1)"] = {
            "run": inversion["run"]["update"]["closest"]["f1"],
            "positive_control": inversion["positive_control"]["closest"]["f1"],
            "held_out": inversion["held_out"]["update"]["closest"]["f1"],
        }
    canaries = report["canaries"]
    if "skipped" not in canaries:
        first, control = next(iter(canaries["repeats"].values())), canaries["positive_control"]
        found = {"run": first["run"], "positive_control": control, "held_out": first["base"]}
        groups["canaries\nguessed"] = {
            kind: one["num_right"] / max(1, one["num_guessed"]) if one else 0.0 for kind, one in found.items()
        }
    return {
        name: {NAMES[kind]: Spread(*3 * (value or 0.0,)) for kind, value in group.items()}
        for name, group in groups.items()
    }


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


def _words(case: Case, report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what belongs below the table."""
    yield (
        f"AUC: {report['num_members']} training rows against {report['num_others']} held-out ones; without"
        f" any signal it is 0.50, give or take {2 * report['null_deviation']:.2f}"
    )
    taken = report["extraction"]
    yield (
        f"texts given back: {taken['suffix']} tokens after the first {taken['prefix']}; bounds in brackets"
        " hold with 95 % confidence"
    )
    if "skipped" in report["inversion"]:
        yield f"tokens read: {report['inversion']['skipped']}"
    else:
        message = report["inversion"]
        yield (
            f"tokens read: F1 on part {message['part']} as {message['codec']}, trained on"
            f" {message['num_rows']} rows of {message['num_tokens']} tokens by"
            f" {', '.join(message['clients'])}"
        )
    if "skipped" in report["canaries"]:
        yield f"canaries: {report['canaries']['skipped']}"
    else:
        yield "exposure in bits, and the epsilon refuted, of canaries that stood so often among the rows"
    for repeats, group in report["canaries"].get("repeats", {}).items():
        if group["claimed"]:
            claimed, bound = group["claimed"], group["run"]["epsilon_lower_bound"]
            verdict = "refutes it" if bound > claimed["epsilon"] else "does not refute it"
            yield (
                f"claimed of a canary x {repeats}: epsilon {claimed['epsilon']:.3g} at delta"
                f" {claimed['delta']:.3g}; the lower bound {bound:.3g} {verdict}"
            )
    if report["claim"] is None:
        yield "claim: none, the run has no privacy plan"
    yield from NOTES
    yield f"report: {shown_path(case.folder / REPORT)}"


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
