"""Figures of runs of few rounds of many steps, made by hand: what is ahead, what is kept, goals."""

import pytest

from fedllm.errors import DataError
from scripts.experiments.distillation.run import TUNED
from scripts.experiments.distillation.shapes import (
    Shape,
    parse_shapes,
    shapes_goals,
    shapes_study,
    shapes_table,
)
from scripts.studies.trials import Figures, Outcome, Trial

CURVE = {"means": [5.0, 4.5, 4.4, 4.3, 4.2], "bytes": 10.0}


def taught(ensemble: float, student: float) -> Figures:
    cell = {"mean": student, "gate_ensemble": ensemble, "gate_after": student, "own": None}
    text = {"held_out_text": "public", "gate_base": 5.0, "gate_before": 4.0, "posterior": cell, TUNED: cell}
    losses = {
        "base": {"mean": 5.0},
        "aggregate": {"mean": 4.0},
        "ensembles": {"posterior": {"mean": ensemble}},
    }
    return {**losses, "texts": {"in domain": text}, "lost": {}}


def do(trials: list[Trial]) -> list[Outcome]:
    """The ensemble is ahead by 1 nat where clients take 4 steps, and by nothing where they take 2."""
    cells = {"1x4": taught(3.0, 3.4), "1x2": taught(4.0, 4.0)}
    return [Outcome(one, CURVE if one.kind == "curve" else cells[str(one.labels["shape"])]) for one in trials]


def test_shapes_are_rounds_and_steps() -> None:
    assert parse_shapes("1x50, 3x100") == (Shape(1, 50), Shape(3, 100))
    with pytest.raises(DataError, match="ROUNDSxSTEPS"):
        parse_shapes("1x50,3")


def test_a_shape_has_the_same_tokens_and_bytes_beside_it() -> None:
    figures = shapes_study((Shape(1, 4), Shape(1, 2)), 1, (1, 2), {}, do)
    far, near = figures["shapes"]["1x4"], figures["shapes"]["1x2"]
    assert (far["same tokens"]["mean"], near["same tokens"]["mean"]) == (4.2, 4.4)
    assert far["same bytes"]["mean"] == near["same bytes"]["mean"] == 4.5
    assert far["ahead"]["mean"] == 1.0
    assert far["texts"]["in domain"]["gap_closed"]["mean"] == pytest.approx(0.6)
    assert (far["texts"]["in domain"]["kept"], near["texts"]["in domain"]["kept"]) == (2, 0)
    goals = shapes_goals(figures)
    assert {name: goal.met for name, goal in goals.items()} == {"gap_closed_in_domain": True}
    assert len(shapes_table(figures).columns) == 1 + 2  # a shape each


def test_many_rounds_are_no_fewer_than_those_of_any_shape() -> None:
    asked: list[str] = []

    def note(trials: list[Trial]) -> list[Outcome]:
        asked.extend(str(one.labels["shape"]) for one in trials if one.kind == "curve")
        return do([one for one in trials if one.kind == "curve"])

    shapes_study((Shape(4, 1), Shape(1, 2)), 4, (1,), {}, note)
    assert asked == ["4x4"]
