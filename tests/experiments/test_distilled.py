"""Figures of the distillation experiment, made by hand: which student counts, whether it is kept, goals."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.errors import NoDataError
from scripts.experiments.distillation import run
from scripts.experiments.distillation.main import goals_of
from scripts.experiments.distillation.tables import is_kept, losses_table, student_of, summary
from scripts.studies.trials import Figures, Outcome, Trial

BEFORE = 4.0  # of the aggregate, on the clients' rows and at the gate


def student(mean: float, *, ensemble: float | None, after: float | None = 3.5) -> Figures:
    figures = {"mean": mean, "worst": mean + 1, "clients": {}, "rate": 0.1, "own": None}
    return {**figures, "gate_ensemble": ensemble, "gate_after": after}


def text(held_out_text: str, posterior: Figures, base: float = 5.0) -> Figures:
    return {
        "held_out_text": held_out_text,
        "gate_base": base,
        "gate_before": BEFORE,
        "posterior": posterior,
        "uniform": student(3.9, ensemble=3.8),
        "logit-mean": student(4.5, ensemble=4.1),
        run.TUNED: student(3.7, ensemble=None),
    }


def outcome(texts: Mapping[str, Figures], seed: int = 1, lost: Mapping[str, str] | None = None) -> Outcome:
    losses = {"mean": BEFORE, "worst": BEFORE + 1}
    figures = {
        "base": {"mean": 6.0, "worst": 7.0},
        "aggregate": losses,
        "ensembles": {"posterior": {"mean": 3.0, "worst": 4.0}},
        "texts": dict(texts),
        "lost": dict(lost or {}),
    }
    return Outcome(Trial("distillation", "distilled", {"kind": "distilled", "seed": seed}, {}, {}), figures)


def test_figures_are_means_over_the_seeds_that_have_the_text() -> None:
    good = text("synthetic", student(3.5, ensemble=3.2))
    better = text("synthetic", student(3.3, ensemble=3.2))
    figures = summary([
        outcome({"synthetic": good}, 1, {"public": "no text is left"}),
        outcome({"public": good, "synthetic": better}, 2),
    ])  # fmt: skip
    row = figures["texts"]["synthetic"]["posterior"]
    assert row["mean"]["mean"] == pytest.approx(3.4)
    assert row["gap_closed"]["mean"] == pytest.approx(0.6)
    assert (row["kept"], row["seeds"]) == (2, 2)
    assert figures["texts"]["public"]["posterior"]["seeds"] == 1
    assert figures["lost"] == [{"text": "public", "seed": 1, "reason": "no text is left"}]
    assert figures["worst_kept_harm"] == pytest.approx(-0.1)
    assert {row["teacher"] for row in figures["harmful"]} == {"logit-mean"}
    assert losses_table(figures).row_count == 3 + 2 * 4
    goals = goals_of(figures)
    assert goals["gap_closed_by_synthetic_text"].value == pytest.approx(0.6)
    assert goals["harm_of_the_worst_kept_student"].met


@pytest.mark.parametrize(
    ("held_out_text", "base", "name"),
    [("public", 5.0, "posterior"), ("public", 2.9, "uniform"), ("synthetic", 2.9, "posterior")],
)
def test_student_of_unknown_public_text_is_the_uniform_teachers(
    held_out_text: str, base: float, name: str
) -> None:
    """As in the product: the posterior's loss of 3.0 is or is not at most the base model's."""
    found = {"texts": {"x": text(held_out_text, student(3.5, ensemble=3.0, after=None), base)}}
    assert student_of(found, "x", "posterior") == found["texts"]["x"][name]
    # The posterior's student diverged, so it is refused; the uniform one is kept.
    assert is_kept(found, "x", "posterior") is (name == "uniform")
    assert is_kept(found, "x", "uniform")
    assert not is_kept(found, "x", "logit-mean"), "its teacher knows no more than the aggregate"


def test_a_student_that_is_kept_and_harms_misses_the_goal() -> None:
    figures = summary([outcome({"synthetic": text("synthetic", student(4.2, ensemble=3.0))})])
    assert figures["worst_kept_harm"] == pytest.approx(0.2)
    assert not goals_of(figures)["harm_of_the_worst_kept_student"].met


def test_without_a_cell_that_succeeded_no_goal_met() -> None:
    trial = Trial("distillation", "distilled", {"kind": "distilled", "seed": 1}, {}, {})
    figures = summary([Outcome(trial, {}, "the model is absent")])
    goals = goals_of(figures)
    assert all(math.isnan(goal.value) and not goal.met for goal in goals.values())
    assert losses_table(figures).row_count == 0


def test_the_published_figures_are_those_of_todays_rule() -> None:
    path = Path(__file__).parents[2] / "docs" / "results" / "distillation.json"
    published = json.loads(path.read_text())["figures"]
    for text_name, by_teacher in published["texts"].items():
        for name, row in by_teacher.items():
            assert sum(is_kept(seed, text_name, name) for seed in published["cells"]) == row["kept"]


def test_a_text_that_cannot_be_used_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def variants(last: Any, holder: Any, config: RunConfig, rates: Sequence[float], teachers: Any) -> Figures:
        if config.distill.text == "bad":
            raise NoDataError("no text is left")
        return {"rates": rates}

    monkeypatch.setattr(run, "variants_of", variants)
    options = {"text:a": "bad", "text:b": "good", "rates": "0.1,0.2"}
    found = run.on_texts(None, None, RunConfig(), options)  # type: ignore[arg-type]
    assert found == {"texts": {"b": {"rates": [0.1, 0.2]}}, "lost": {"a": "no text is left"}}
