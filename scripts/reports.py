"""What benchmarks and experiments report: spreads, goals, tables, the machine and one JSON line."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
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


def mean_spread(value: Mapping[str, float]) -> Spread:
    """Return a mean with its standard deviation, {"mean", "sd"}, as a range to draw."""
    return Spread(value["mean"] - value["sd"], value["mean"], value["mean"] + value["sd"])


def mean_and_sd(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and the sample standard deviation (0 of a single value)."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


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
    """Return JSON's own kinds of values: floats to the digits a measurement has, None for infinity."""
    if isinstance(value, Spread):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


class ReportOptions(Protocol):
    """Where a report goes: to stdout as its last line with `json`, and to the file `output`."""

    @property
    def json(self) -> bool:
        """Whether stdout gets it."""

    @property
    def output(self) -> Path | None:
        """The file that gets it."""


def publish(
    options: ReportOptions, name: str, figures: Mapping[str, Any], goals: Mapping[str, Goal]
) -> dict[str, Any]:
    """Write the report of these figures where the options say, and return it."""
    result = report(name, figures, goals)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    return result


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Return what a figure depends on besides the code; nothing that names the machine or its user."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": _commit(),
    }


def _commit() -> str:
    """Return the commit this runs from, "+" where files differ from it; "" outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    here = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
