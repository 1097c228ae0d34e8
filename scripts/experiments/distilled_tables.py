"""The figures of the distillation experiment: means over seeds, a table and a plot."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from scripts.benchmarks.tools import figures_table
from scripts.experiments.cells import Figures, Outcome
from scripts.experiments.distilled import TEACHERS, TUNED
from scripts.experiments.methods import mean_and_sd
from scripts.experiments.plots import dots
from strategies.distillation.gate import judged

ENSEMBLE = "posterior"  # the one whose loss is the ceiling


def summary(outcomes: Sequence[Outcome]) -> Figures:
    """Return every figure over the seeds as mean and standard deviation.

    Figures of a text: by teacher the clients' mean and worst loss, the gap closed and how often the gate kept
    the student. `worst_kept_harm` is the largest rise of the clients' mean loss by a student that was kept
    (below 0 where every one gained), `harmful` those that rose it, kept or not.
    """
    seeds = [outcome.figures for outcome in outcomes if outcome.is_done and "texts" in outcome.figures]
    pooled = [outcome.figures for outcome in outcomes if outcome.is_done and "texts" not in outcome.figures]
    if not seeds:
        return {"seeds": 0, "texts": {}, "worst_kept_harm": float("nan"), "harmful": []}
    lines: Figures = {
        "base": _losses([one["base"] for one in seeds]),
        "aggregate": _losses([one["aggregate"] for one in seeds]),
        **{
            f"{kind} ensemble": _losses([one["ensembles"][kind] for one in seeds])
            for kind in seeds[0]["ensembles"]
        },
    }
    if pooled:
        lines["centralised"] = _losses(
            [{"mean": one["mean_after"], "worst": one["worst_after"]} for one in pooled]
        )
    texts: Figures = {
        text: {name: _taught(seeds, text, name) for name in (*TEACHERS, TUNED)} for text in seeds[0]["texts"]
    }
    students = [
        (text, name, one["texts"][text][name]["mean"] - one["aggregate"]["mean"], is_kept(one, text, name))
        for one in seeds
        for text in one["texts"]
        for name in TEACHERS
    ]
    return {
        "seeds": len(seeds),
        "lines": lines,
        "texts": texts,
        "worst_kept_harm": max((rise for *_, rise, kept in students if kept), default=0.0),
        "harmful": [
            {"text": text, "teacher": name, "rise": rise, "kept": kept}
            for text, name, rise, kept in students
            if rise > 0
        ],
        "cells": seeds,
    }


def is_kept(seed: Figures, text: str, name: str) -> bool:
    """Return whether the gate keeps a student, as the product's would."""
    found, cell = seed["texts"][text], seed["texts"][text][name]
    after = math.nan if cell["gate_after"] is None else cell["gate_after"]
    own = tuple(cell["own"]) if cell["own"] else None
    kept, _ = judged(
        found["gate_before"], after, found["held_out_text"], teacher=cell["gate_ensemble"], own=own
    )
    return kept


def _losses(found: Sequence[Figures]) -> Figures:
    return {name: mean_and_sd([one[name] for one in found]) for name in ("mean", "worst")}


def _taught(seeds: Sequence[Figures], text: str, name: str) -> Figures:
    cells = [one["texts"][text][name] for one in seeds]
    gaps = [
        (one["aggregate"]["mean"] - cell["mean"])
        / (one["aggregate"]["mean"] - one["ensembles"][ENSEMBLE]["mean"])
        for one, cell in zip(seeds, cells, strict=True)
    ]
    return {
        **_losses(cells),
        "gap_closed": mean_and_sd(gaps),
        "kept": sum(is_kept(one, text, name) for one in seeds),
        "rates": [cell["rate"] for cell in cells],
    }


def losses_table(figures: Figures) -> Table:
    """Return the table: losses of what is there before, then of every text and teacher."""
    rows = {
        name: [_number(row["mean"]), _number(row["worst"]), "", ""]
        for name, row in figures.get("lines", {}).items()
    }
    for text, by_teacher in figures["texts"].items():
        for name, row in by_teacher.items():
            gap = f"{row['gap_closed']['mean']:.0%} ±{row['gap_closed']['sd']:.0%}"
            kept = f"{row['kept']} of {figures['seeds']}"
            rows[f"{text}: {name}"] = [_number(row["mean"]), _number(row["worst"]), gap, kept]
    columns = ("mean loss", "worst client", "gap closed", "kept by the gate")
    return figures_table("held-out loss of the clients: mean and sd over seeds", columns, rows)


def draw_gaps(figures: Figures, path: Path) -> None:
    """Draw the share of the gap that every teacher closes, one group of dots per text."""
    groups = {
        text: {name: row["gap_closed"] for name, row in by_teacher.items()}
        for text, by_teacher in figures["texts"].items()
    }
    dots(groups, path, label="share of the gap from aggregate to ensemble that is closed")


def _number(value: Figures) -> str:
    return f"{value['mean']:.4f} ±{value['sd']:.4f}"
