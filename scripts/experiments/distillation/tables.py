"""The figures of the distillation experiment: means over seeds, a table and a plot."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fedllm.runs.records import DistillationLosses, LossChange
from scripts.charts import dots
from scripts.experiments.distillation.run import TEACHERS, TUNED
from scripts.reports import figures_table, mean_and_sd, mean_spread
from scripts.studies.trials import Figures, Outcome
from strategies.distillation.gate import judge_losses
from strategies.distillation.material import PUBLIC

ENSEMBLE = "posterior"  # the one whose loss is the ceiling


def summary(outcomes: Sequence[Outcome]) -> Figures:
    """Return every figure over the seeds as mean and standard deviation.

    Figures of a text: by teacher the clients' mean and worst loss, the gap closed, of how many seeds, and of
    how many the gate kept the student. The student is that of `student_of`. `worst_kept_harm` is the largest
    rise of the clients' mean loss by a student that was kept (below 0 where every one gained; not a number
    where no cell succeeded), `harmful` those that rose it, kept or not; `lost` says which text failed under
    which seed, and why.
    """
    lost = [
        {"text": text, "seed": outcome.trial.labels["seed"], "reason": reason}
        for outcome in outcomes
        for text, reason in outcome.figures.get("lost", {}).items()
    ]
    seeds = [outcome.figures for outcome in outcomes if outcome.is_done and "texts" in outcome.figures]
    pooled = [outcome.figures for outcome in outcomes if outcome.is_done and "texts" not in outcome.figures]
    if not seeds:
        return {"seeds": 0, "texts": {}, "worst_kept_harm": math.nan, "harmful": [], "lost": lost}
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
        text: {
            name: _taught([one for one in seeds if text in one["texts"]], text, name)
            for name in (*TEACHERS, TUNED)
        }
        for text in dict.fromkeys(text for one in seeds for text in one["texts"])
    }
    students = [
        (text, name, student_of(one, text, name)["mean"] - one["aggregate"]["mean"], is_kept(one, text, name))
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
        "lost": lost,
        "cells": seeds,
    }


def student_of(seed: Figures, text: str, name: str) -> Figures:
    """Return the figures of the student that the product would have under a teacher of that name.

    Where public text is held out and the posterior mixture's loss on it is not at most the base model's, the
    uniform teacher takes its place (`strategies.distillation.step`). In the figures of
    docs/results/distillation.json, which are older than this rule, that is so nowhere.
    """
    found = seed["texts"][text]
    if name == "posterior" and found["held_out_text"] == PUBLIC:
        is_supported = found[name]["gate_ensemble"] <= found["gate_base"]
        return dict(found[name if is_supported else "uniform"])
    return dict(found[name])


def is_kept(seed: Figures, text: str, name: str) -> bool:
    """Return whether the gate keeps that student, as the product's would."""
    return judge(seed["texts"][text], student_of(seed, text, name))


def judge(found: Figures, cell: Figures, clients: LossChange | None = None) -> bool:
    """Return the verdict of the product's gate on a student, `cell`, of the text `found`.

    With `clients`, the change of their losses, they are asked too, as by default where losses may leave.
    """
    after = math.nan if cell["gate_after"] is None else cell["gate_after"]
    losses = DistillationLosses(
        base=found["gate_base"],
        # The control has no teacher, so none that could know too little.
        ensemble=-math.inf if cell["gate_ensemble"] is None else cell["gate_ensemble"],
        held_out=LossChange(found["gate_before"], after),
        error=cell.get("gate_error"),
        own=LossChange(*cell["own"]) if cell["own"] else None,
    )
    kept, _ = judge_losses(losses, found["held_out_text"], asks_clients=clients is not None)
    return kept and (clients is None or clients.after <= clients.before)


def _losses(found: Sequence[Figures]) -> Figures:
    return {name: mean_and_sd([one[name] for one in found]) for name in ("mean", "worst")}


def _taught(seeds: Sequence[Figures], text: str, name: str) -> Figures:
    cells = [student_of(one, text, name) for one in seeds]
    gaps = [
        (one["aggregate"]["mean"] - cell["mean"])
        / (one["aggregate"]["mean"] - one["ensembles"][ENSEMBLE]["mean"])
        for one, cell in zip(seeds, cells, strict=True)
    ]
    return {
        **_losses(cells),
        "gap_closed": mean_and_sd(gaps),
        "seeds": len(seeds),
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
            kept = f"{row['kept']} of {row['seeds']}"
            rows[f"{text}: {name}"] = [_number(row["mean"]), _number(row["worst"]), gap, kept]
    columns = ("mean loss", "worst client", "gap closed", "kept by the gate")
    return figures_table("held-out loss of the clients: mean and sd over seeds", columns, rows)


def draw_gaps(figures: Figures, path: Path) -> None:
    """Draw the share of the gap that every teacher closes, one group of dots per text."""
    groups = {
        text: {name: mean_spread(row["gap_closed"]) for name, row in by_teacher.items()}
        for text, by_teacher in figures["texts"].items()
    }
    label = "share of the gap from aggregate to ensemble that is closed"
    dots(path, "What a student keeps", label, groups, reference=0.0)


def _number(value: Figures) -> str:
    return f"{value['mean']:.4f} ±{value['sd']:.4f}"
