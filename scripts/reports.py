"""What benchmarks and experiments report: spreads, goals, tables and one JSON line."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Spread:
    """The range of a figure over the repetitions."""

    min: float
    median: float
    max: float

    def text(self, digits: int = 2) -> str:
        """Return "min median max"."""
        return " ".join(f"{value:.{digits}f}" for value in (self.min, self.median, self.max))


@dataclass(frozen=True)
class Goal:
    """A figure that must reach `goal`, or with `at_most` not exceed it."""

    value: float
    goal: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it does."""
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def spread(values: Sequence[float]) -> Spread:
    """Return the range of `values`, at least one."""
    return Spread(min(values), statistics.median(values), max(values))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the range of the quotients, each taken within one repetition."""
    return spread([top / bottom for top, bottom in zip(numerators, denominators, strict=True)])


def spreads_table(variants: Mapping[str, Mapping[str, Spread]], digits: Mapping[str, int]) -> Table:
    """Return a table of one column per variant and one row per figure that `digits` names."""
    rows = {
        key.replace("_", " "): [figures[key].text(number) for figures in variants.values()]
        for key, number in digits.items()
    }
    return figures_table("min, median and max over the repetitions", tuple(variants), rows)


def figures_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """Return a table of ready-made cells, one row per name."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def megabytes(number: int | None) -> str:
    """Return bytes as text in MB; "?" where they are not known."""
    return "?" if number is None else f"{number / 1e6:.0f}"


def report(name: str, figures: Mapping[str, Any], goals: Mapping[str, Goal]) -> dict[str, Any]:
    """Return the JSON-ready object a benchmark prints and keeps, its numbers to five digits."""
    judged = {key: {"value": goal.value, "goal": goal.goal, "met": goal.met} for key, goal in goals.items()}
    return {"name": name, "figures": _plain(figures), "goals": _plain(judged)}


def _plain(value: Any) -> Any:
    """Return JSON's own kinds of values, floats cut to the digits a measurement can carry."""
    if isinstance(value, Spread):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def emit(result: Mapping[str, Any], *, as_json: bool, output: Path | None) -> None:
    """Keep `result` in the file `output`, and print it as the last line of stdout with `as_json`."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
