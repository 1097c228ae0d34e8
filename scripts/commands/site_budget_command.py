"""`fedllm site budget`: what all runs of all servers have spent of each data set, and what is left."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from fedllm.privacy.data_budget import CLIENT, EXAMPLE, DataBudget, budget_folders, spent
from fedllm.privacy.ledger import Ledger
from fedllm.site_policy import SitePolicy, load_policy
from scripts.console import Console


def budget(file: Path | None, *, as_json: bool) -> None:
    """Print the budget of each data set of this machine, by unit and by run."""
    policy = load_policy(file)
    report = report_of(policy)
    if as_json:
        print(json.dumps(report))
    else:
        _print(Console(), policy, report)


def report_of(policy: SitePolicy) -> list[dict[str, Any]]:
    """Return for each data set and unit what is spent, what is left and what each run alone has spent.

    Without bound is None: nothing is left where that is spent, and no limit is set where that is left.

    Raises:
        CheckpointError: a ledger is damaged.
    """
    return [row for folder in budget_folders(policy.state_folder) for row in _rows(policy, folder)]


def _rows(policy: SitePolicy, folder: Path) -> Iterator[dict[str, Any]]:
    limit, data_set = policy.budget, DataBudget(folder=folder)
    ledger = data_set.ledger
    for unit in (EXAMPLE, CLIENT):
        if not any(unit in entry.charges for entry in ledger.entries) and unit != limit.unit:
            continue  # nothing ever hid it, and nobody asks
        total = spent(ledger, unit, limit.delta)
        bounds = bool(limit.epsilon) and unit == limit.unit
        yield {
            "data_set": data_set.data_set,
            "unit": unit,
            "delta": limit.delta,
            "spent": _finite(total),
            "left": max(0.0, limit.epsilon - total) if bounds else None,
            "limit": limit.epsilon if bounds else None,
            "answers": len(ledger.entries),
            "runs": {
                run: _finite(spent(_of_run(ledger, run), unit, limit.delta))
                for run in dict.fromkeys(entry.run for entry in ledger.entries)
            },
        }


def _of_run(ledger: Ledger, run: str) -> Ledger:
    return Ledger(tuple(entry for entry in ledger.entries if entry.run == run))


def _finite(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else epsilon


def _print(console: Console, policy: SitePolicy, report: list[dict[str, Any]]) -> None:
    if not report:
        console.line(f"no answer under a privacy plan has left the data sets of {policy.state_folder} yet")
        return
    table = Table("data set", "unit", "run", "spent", "left", box=None, header_style="bold", pad_edge=False)
    for row in report:
        left = "no limit" if row["left"] is None else f"{row['left']:.3g} of {row['limit']:g}"
        table.add_row(row["data_set"], row["unit"], "all", _shown(row["spent"]), left)
        for run, alone in row["runs"].items():
            table.add_row("", "", run, _shown(alone), "")
    console.rich.print(table)
    console.line(
        f"epsilon at delta {policy.budget.delta:g}; several runs together spend less than the sum of each."
        " Not counted: what left without noise of this machine's own"
    )


def _shown(epsilon: float | None) -> str:
    return "no bound" if epsilon is None else f"{epsilon:.3g}"
