"""The page of a study: what joining brought, to whom, next to its controls and at which cost."""

from collections.abc import Mapping
from typing import Any

from fedllm.runs.spread import keep_common_clients
from scripts.reporting.figures import Dot, dot_chart
from scripts.reporting.parts import Page, Section, Table, from_terminal
from scripts.reporting.run_page import client_section
from scripts.studies.cells import METHODS
from scripts.studies.findings import findings, study_tables

_FOOTER = (
    "Made by fedllm from study.json. It names data holders with their losses, so it is for those who run the"
    " federation."
)
_DRAWN = ("base", "alone", "federated", "home", "private-home", "centralised")  # by data holder


def study_page(study: dict[str, Any]) -> Page:
    """Return the page of what `fedllm study` wrote."""
    summary = study["summary"]
    lines = findings(study) or ["Methods that can be compared were not all measured."]
    tables = [from_terminal(table, str(table.title or "")) for table in study_tables(study)]
    tables.append(Table("methods", ["name", "what it is"], [(name, METHODS[name]) for name in summary]))
    sections = [
        Section(
            _best(summary),
            ["A dot is the mean over data holders, a bar one standard deviation over seeds to each side."],
            dot_chart(_by_method(summary), "mean held-out loss of each method", "loss, nats per token"),
            tables,
        )
    ]
    gaps = {name: {"gap closed": _gap(found)} for name, found in summary.items() if found["gap_closed"]}
    if gaps:
        chart = dot_chart(gaps, "gap closed", "0 = base model, 1 = pooled data")
        text = [
            "How much of the way from the base model to training on everybody's rows, with 95 % intervals."
        ]
        sections.append(Section("How close each method comes to pooling the data", text, chart))
    columns = keep_common_clients({name: summary[name]["clients"] for name in _DRAWN if name in summary})
    if columns and all(columns.values()):
        sections.append(client_section("By data holder", columns))
    tiles = [("methods", str(len(summary))), ("seeds", str(len(study["seeds"])))]
    tiles.append(("rates tried", str(len(study["rates"]))))
    return Page(f"Study {study['name']}", lines, tiles, sections, _FOOTER)


def _by_method(summary: Mapping[str, Any]) -> dict[str, dict[str, Dot]]:
    return {
        name: {
            "mean of all": _spread(found["mean"], found["deviation"]),
            "worst data holder": Dot(found["worst"]["loss"]),
        }
        for name, found in summary.items()
    }


def _spread(mean: float, deviation: float | None) -> Dot:
    return Dot(mean) if deviation is None else Dot(mean, mean - deviation, mean + deviation)


def _gap(found: Mapping[str, Any]) -> Dot:
    gap = found["gap_closed"]
    return Dot(gap["value"], gap["low"], gap["high"])


def _best(summary: Mapping[str, Any]) -> str:
    best = min(summary, key=lambda name: (summary[name]["mean"], name))
    return f"The lowest mean loss, {summary[best]['mean']:.3f}, is that of {best}: {METHODS[best]}"
