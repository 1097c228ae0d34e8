"""Runs of few rounds of many local steps: what is there to teach, and what do many rounds of few steps reach?

A shape is a number of rounds and of local steps in each. After its last round the posterior ensemble is
measured and taught back into the aggregate, next to the control that is tuned on the same text. One run of
many rounds of few steps, measured after each, says what the same tokens and the same bytes give without any
teaching.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from fedllm.config.key import Scalar
from fedllm.errors import DataError
from fedllm.runs.records import LossChange
from scripts.experiments.distillation.run import TUNED
from scripts.experiments.distillation.tables import ENSEMBLE, judge
from scripts.experiments.runs import figures_of, run
from scripts.reports import Goal, figures_table, mean_and_sd
from scripts.studies.trials import Figures, Outcome, RunTrials, Setting, Trial
from strategies.distillation.gate import LEAST_AHEAD

GOALS = {"in domain": 0.5, "synthetic": 1 / 3}  # of the gap to the ensemble that a student is to close


@dataclass(frozen=True)
class Shape:
    """How many rounds a run has, and how many steps every client takes in each."""

    rounds: int
    steps: int

    def __str__(self) -> str:
        return f"{self.rounds}x{self.steps}"


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Return the shapes of a list such as "1x50,3x50".

    Raises:
        DataError: it is no such list.
    """
    try:
        pairs = [word.split("x") for word in text.split(",") if word.strip()]
        return tuple(Shape(int(rounds), int(steps)) for rounds, steps in pairs)
    except ValueError:
        raise DataError(f"--shapes {text}: expected ROUNDSxSTEPS with commas between, as 1x50,3x50") from None


def curve(trial: Trial, setting: Setting) -> Figures:
    """Do a run that is measured after every round; return the clients' mean losses, the base's first."""
    records = run(setting.config(trial)).records
    return {"means": [record.mean_held_out for record in records], "bytes": figures_of(records)["bytes_up"]}


def shapes_study(
    shapes: Sequence[Shape], few: int, seeds: Sequence[int], taught: Mapping[str, Scalar], do: RunTrials
) -> Figures:
    """Do the runs of every shape and seed; `few` is the steps of a round where rounds are many.

    `taught` are the options of the trials that teach. Figures are means and deviations over the seeds.
    """
    most = max(shape.rounds * shape.steps for shape in shapes)
    options = {**taught, "teachers": ENSEMBLE}
    many = Shape(max(-(-most // few), *(shape.rounds for shape in shapes)), few)
    outcomes = do([_trial("curve", many, seed, {}) for seed in seeds])
    curves = {outcome.trial.labels["seed"]: outcome.figures for outcome in outcomes if outcome.is_done}
    trials = [_trial("distilled", shape, seed, options) for shape in shapes for seed in seeds]
    cells = [outcome for outcome in do(trials) if outcome.is_done]
    by_shape = {
        str(shape): _shape_figures(
            shape, few, [cell for cell in cells if cell.trial.labels["shape"] == str(shape)], curves
        )
        for shape in shapes
    }
    lost = [
        {**outcome.trial.labels, "reason": reason}
        for outcome in cells
        for reason in outcome.figures["lost"].values()
    ]
    return {"few_steps": few, "shapes": by_shape, "lost": lost, "cells": [cell.figures for cell in cells]}


def _trial(kind: str, shape: Shape, seed: int, options: Mapping[str, Scalar]) -> Trial:
    keys: dict[str, Scalar] = {
        "federation.num-rounds": shape.rounds,
        "train.local-steps": shape.steps,
        "seed": seed,
    }
    if kind == "curve":
        keys |= {"evaluation.every": "1", "distill.when": "never"}
    return Trial("shapes", kind, {"kind": kind, "shape": str(shape), "seed": seed}, keys, options)


def _shape_figures(
    shape: Shape, few: int, cells: Sequence[Outcome], curves: Mapping[Scalar, Figures]
) -> Figures:
    """Return what a shape gives: losses are means over clients on rows that they hold out."""
    found = [cell.figures for cell in cells]
    if not found:
        return {"seeds": 0}
    seeds = [cell.trial.labels["seed"] for cell in cells]
    means = {
        "base": [one["base"]["mean"] for one in found],
        "aggregate": [one["aggregate"]["mean"] for one in found],
        "ensemble": [one["ensembles"][ENSEMBLE]["mean"] for one in found],
        "ahead": [_ahead(one) for one in found],
    }
    reached = [(curves[seed]["means"], curves[seed]["bytes"]) for seed in seeds if seed in curves]
    if reached:
        means["same tokens"] = [losses[shape.rounds * shape.steps // few] for losses, _ in reached]
        means["same bytes"] = [losses[shape.rounds] for losses, _ in reached]
        means["bytes up of a client"] = [shape.rounds * size for _, size in reached]
    names = dict.fromkeys(name for one in found for name in one["texts"])
    return {
        "seeds": len(found),
        **{name: mean_and_sd(values) for name, values in means.items()},
        "texts": {
            name: _text_figures(name, [one for one in found if name in one["texts"]]) for name in names
        },
    }


def _ahead(cell: Figures) -> float:
    return float(cell["aggregate"]["mean"] - cell["ensembles"][ENSEMBLE]["mean"])


def _text_figures(name: str, cells: Sequence[Figures]) -> Figures:
    """Return what the posterior student and the control make of a text, and what the gate saw."""
    students = [cell["texts"][name][ENSEMBLE] for cell in cells]
    gains = [cell["aggregate"]["mean"] - one["mean"] for cell, one in zip(cells, students, strict=True)]
    return {
        "student": mean_and_sd([one["mean"] for one in students]),
        "control": mean_and_sd([cell["texts"][name][TUNED]["mean"] for cell in cells]),
        "gap_closed": mean_and_sd(
            [gain / (_ahead(cell) or math.inf) for gain, cell in zip(gains, cells, strict=True)]
        ),
        "ahead_at_gate": mean_and_sd(
            [
                cell["texts"][name]["gate_before"] - cell["texts"][name][ENSEMBLE]["gate_ensemble"]
                for cell in cells
            ]
        ),
        "kept": sum(
            judge(cell["texts"][name], one, LossChange(cell["aggregate"]["mean"], one["mean"]))
            for cell, one in zip(cells, students, strict=True)
        ),
    }


def shapes_goals(figures: Figures) -> dict[str, Goal]:
    """Return the least gap that each text closes where an ensemble is ahead; nothing where none is."""
    goals = {}
    for name, goal in GOALS.items():
        closed = [
            shape["texts"][name]["gap_closed"]["mean"]
            for shape in figures["shapes"].values()
            if shape["seeds"] and shape["ahead"]["mean"] > LEAST_AHEAD and name in shape["texts"]
        ]
        if closed:
            goals[f"gap_closed_{name.replace(' ', '_')}"] = Goal(min(closed), goal)
    return goals


def shapes_table(figures: Figures) -> Table:
    """Return a column for each shape: what is ahead, what a student keeps of it, what many rounds reach."""
    shapes = {name: shape for name, shape in figures["shapes"].items() if shape["seeds"]}
    texts = list(dict.fromkeys(text for shape in shapes.values() for text in shape["texts"]))
    rows = {
        name: [_text(shape[name]) for shape in shapes.values()] for name in ("aggregate", "ensemble", "ahead")
    }
    for text in texts:
        found = [shape["texts"].get(text) for shape in shapes.values()]
        rows[f"student, {text}"] = ["" if one is None else _text(one["student"]) for one in found]
        rows[f"  closes, {text}"] = ["" if one is None else _closed(one) for one in found]
        rows[f"  control, {text}"] = ["" if one is None else _text(one["control"]) for one in found]
    for name in ("same tokens", "same bytes"):
        told = f"{figures['few_steps']} steps a round, {name}"
        rows[told] = [_text(shape.get(name)) for shape in shapes.values()]
    return figures_table("clients' held-out loss, mean (sd) over seeds", list(shapes), rows)


def _closed(found: Figures) -> str:
    return f"{found['gap_closed']['mean']:.0%}, kept {found['kept']}"


def _text(value: Figures | None) -> str:
    return "" if value is None else f"{value['mean']:.3f} ({value['sd']:.3f})"
