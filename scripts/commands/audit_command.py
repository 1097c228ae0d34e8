"""`fedllm audit`: what attacks learn from a run, and from controls that hide everything or nothing."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedllm.adapters.folder import replace_card
from fedllm.errors import CheckpointError, ConfigError
from fedllm.files import SIGNATURE, write_file
from fedllm.runs.memorisation import write_memorisation
from scripts.auditing.canaries import canary_report
from scripts.auditing.control import overfit
from scripts.auditing.inversion import inversion_report
from scripts.auditing.membership import (
    curves,
    extraction_report,
    membership_report,
    null_deviation,
    scored,
)
from scripts.auditing.memorisation import figures_of, near_duplicates_report, with_memorisation
from scripts.auditing.opening import Case, open_case
from scripts.auditing.table import REPORT, table_of
from scripts.charts import check_plot, roc_and_bars
from scripts.console import Console, shown_path
from scripts.reports import Spread

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
    target: Path,
    *,
    rows: int,
    prefix: int,
    suffix: int,
    epochs: int,
    plot: Path | None,
    on_card: bool,
    as_json: bool,
) -> None:
    """Audit a run folder: print one table, write audit.json and memorisation.json into it, draw a plot.

    `on_card` puts the figures of memorisation on the adapter's card too.

    Raises:
        FedLLMError: the run, its rows or its base model are not here; a plot is wanted that cannot be drawn;
            a card is to say more that was signed already.
        CheckpointError: a file cannot be written.
    """
    check_plot(plot)
    if on_card and (target / "adapter" / SIGNATURE).exists():
        raise ConfigError(f"{target}: its adapter is signed, and the card with it; audit before you sign")
    with TemporaryDirectory() as scratch:
        case = open_case(target, max_rows=rows, scratch=Path(scratch))
        report, lines = report_of(case, prefix=prefix, suffix=suffix, epochs=epochs)
    try:
        write_file(case.folder / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
        write_memorisation(case.folder, case.adapter.digest, figures_of(report))
        if on_card:
            card = (case.folder / "adapter" / "README.md").read_text()
            replace_card(case.folder / "adapter", with_memorisation(card, figures_of(report)))
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
        "near_duplicates": near_duplicates_report(case, control, prefix=prefix, suffix=suffix),
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
