"""The privacy experiment: the arithmetic of its figures, and its trial on the tiny model."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedllm.config.key import Scalar
from fedllm.plan.run_plan import resolve
from scripts.experiments.privacy.main import (
    CLIENTS,
    FULL,
    KINDS,
    QUICK,
    SILOS,
    SMOLLM2,
    Size,
    do_parts,
    draw,
)
from scripts.experiments.privacy.run import by_heart, private
from scripts.experiments.privacy.study import Part, study
from scripts.experiments.privacy.tables import (
    BY_HEART,
    CLIPPED,
    NONE,
    UNBUDGETED,
    goals_of,
    privacy_tables,
    rows_of,
)
from scripts.reports import report
from scripts.studies.trials import Figures, Outcome, Setting, Trial, TrialRunner

PART = Part(
    "rows",
    flat={"federation.num-rounds": 2},
    private={"privacy.unit": "example"},
    presets=("ffa", "fedit"),
    epsilons=(1.0, 8.0),
    seeds=(1, 2),
    rates=(0.1, 0.2),
    private_rates=(0.1, 0.2),
    clips=(0.5, 1.0, 2.0),
    audit_rows=4,
)
TINY = Size(
    flat={},
    rows_of_domain=12,
    parts=(
        Part(
            SILOS,
            flat={
                "federation.num-clients": 3,
                "data.partition": "column:domain",
                "data.held-out-fraction": 0.2,
                "lora.init-a": "orthonormal",
            },
            private={"privacy.unit": "example"},
            presets=("ffa",),
            epsilons=(8.0,),
            seeds=(1,),
            rates=(0.01,),
            private_rates=(0.01,),
            clips=(1.0,),
            audit_rows=4,
            epochs=2,
        ),
        Part(
            CLIENTS,
            flat={
                "federation.num-clients": 6,
                "federation.cohort": 5,
                "federation.num-rounds": 2,
                "federation.selection": "poisson",
                "aggregation.weighting": "uniform",
                "data.partition": "iid",
                "data.held-out-fraction": 0.2,
            },
            private={"privacy.unit": "client", "privacy.delta": 1e-3},
            presets=("ffa",),
            epsilons=(8.0,),
            seeds=(1,),
            rates=(0.01,),
            private_rates=(0.01,),
            clips=(0.5, 1.0),
            clipped={"federation.selection": "uniform"},
            tuning_epsilon=8.0,
            audit_rows=4,
        ),
    ),
)


def figures_of(trial: Trial) -> Figures:
    """Return figures by a formula: least loss at rate 0.2 and clip 1, more the less epsilon there is."""
    epsilon, rate, clip = (float(trial.labels[name]) for name in ("epsilon", "rate", "clip"))
    price = 1 / epsilon if epsilon > 0 else 0.0
    loss = 2.0 + price + abs(rate - 0.2) + (abs(clip - 1.0) if epsilon > 0 else 0.0)
    after = {"a": loss - 0.5, "b": loss + 0.5}
    found: Figures = {
        "before": {"a": 4.0, "b": 4.0},
        "after": after,
        "mean_before": 4.0,
        "mean_after": loss,
        "worst_after": max(after.values()),
        "privacy": {"budget": epsilon, "epsilon": 0.9 * epsilon, "noise_multiplier": 2 * price},
    }
    if trial.kind == "by heart":
        return {"membership": {"area": 1.0, "caught": 1.0, "base": 0.5, "null_deviation": 0.1}}
    if trial.options:
        area = 0.6 if epsilon else 0.7
        found["membership"] = {"area": area, "caught": 0.02, "base": 0.5, "null_deviation": 0.05}
    return found


class Do:
    """Does trials by the formula, and remembers them."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def __call__(self, trials: Sequence[Trial]) -> list[Outcome]:
        self.trials += trials
        return [Outcome(trial, figures_of(trial)) for trial in trials]


def test_rate_and_clip_are_tuned_on_a_seed_not_reported() -> None:
    do = Do()
    found = study(PART, do)
    assert found["tuned"] == {
        f"{preset}, {name}": {"rate": 0.2, "clip": clip}
        for preset in PART.presets
        for name, clip in (("not private", 0.0), ("private", 1.0))
    }
    assert found["at_edge"] == [
        f"{preset}, {name}: rate 0.2" for preset in PART.presets for name in ("not private", "private")
    ]
    tuning = [trial for trial in do.trials if trial.labels["seed"] == PART.tuning_seed]
    assert len(tuning) == len(found["tuning"]) == 2 * (2 + 6)
    assert {trial.labels["epsilon"] for trial in tuning} == {NONE, PART.tuning_epsilon}
    assert not any(trial.options for trial in tuning)  # no attack on what is not reported
    reported = [trial for trial in do.trials if trial.labels["seed"] != PART.tuning_seed]
    assert {trial.labels["seed"] for trial in reported} == {1, 2}
    assert len(reported) == 2 * 3 * 2


def test_share_kept_is_of_the_presets_gain_without_privacy() -> None:
    rows = {(row["preset"], row["budget"]): row for row in study(PART, Do())["rows"]}
    assert rows["ffa", NONE]["kept"]["mean"] == 1.0
    assert rows["ffa", 1.0]["kept"]["mean"] == pytest.approx((4 - 3) / (4 - 2))
    assert rows["fedit", 8.0]["kept"]["mean"] == pytest.approx((4 - 2.125) / 2)
    assert rows["ffa", 8.0]["worst_after"]["mean"] == pytest.approx(2.125 + 0.5)
    assert "epsilon" not in rows["ffa", NONE]
    assert (rows["ffa", 8.0]["epsilon"], rows["ffa", 8.0]["noise_multiplier"]) == (7.2, 0.25)


def test_preset_without_gain_has_no_share_kept() -> None:
    def outcome(epsilon: float, after: float) -> Outcome:
        labels: dict[str, Scalar] = {"preset": "ffa", "epsilon": epsilon, "rate": 0.1, "clip": 1.0, "seed": 1}
        spent = {"epsilon": epsilon, "noise_multiplier": 1.0}
        losses = {"mean_before": 4.0, "mean_after": after, "worst_after": after, "privacy": spent}
        return Outcome(Trial("privacy", "private", labels, {}), losses)

    assert all("kept" not in row for row in rows_of([outcome(8.0, 3.0), outcome(NONE, 5.0)]))


def test_clipping_alone_is_no_budget_and_takes_the_tuned_rate() -> None:
    do = Do()
    part = replace(PART, clipped={"federation.selection": "uniform"})
    study(part, do)
    alone = [trial for trial in do.trials if trial.labels["epsilon"] == CLIPPED]
    assert {(trial.flat["federation.selection"], trial.flat["privacy.clip"]) for trial in alone} == {
        ("uniform", 1.0)
    }
    others = [trial for trial in do.trials if trial.labels["epsilon"] != CLIPPED]
    assert all("federation.selection" not in trial.flat for trial in others)


def test_control_of_the_attack_has_no_part_in_losses_and_goals() -> None:
    do = Do()
    found = study(replace(PART, epochs=3), do)
    plain = study(PART, Do())
    control = found["rows"].pop()
    assert (control["preset"], control["budget"]) == ("ffa", BY_HEART)
    assert "area" in control
    assert not {"kept", "epsilon", "mean_after"} & control.keys()
    assert found == plain
    by_heart = [trial for trial in do.trials if trial.kind == "by heart"]
    assert [(trial.labels["seed"], trial.options["epochs"]) for trial in by_heart] == [(1, 3), (2, 3)]
    assert not any("privacy.epsilon" in trial.flat for trial in by_heart)


def test_goal_fails_for_a_ledger_over_budget_or_a_leak() -> None:
    part = study(PART, Do())
    met = goals_of({"rows": part})
    assert met["epsilon_spent_over_budget"].value == pytest.approx(0.9)
    assert all(goal.met for goal in met.values())
    worse = [
        {**row, "epsilon": 1.01 * row["budget"], "area": {"mean": 0.9, "sd": 0.0}} if row["budget"] else row
        for row in part["rows"]
    ]
    judged = goals_of({"rows": {**part, "rows": worse}})
    assert not any(goal.met for goal in judged.values())
    error = 2 * math.sqrt(2) * 0.05 / math.sqrt(2)  # of two means over two seeds
    assert judged["rise_of_auc_by_privacy_over_its_error, rows"].value == pytest.approx((0.9 - 0.7) / error)


def test_a_run_that_failed_leaves_its_reason_and_no_row() -> None:
    def failing(trials: Sequence[Trial]) -> list[Outcome]:
        return [Outcome(trial, {}, "failed: diverged") for trial in trials]

    single = replace(PART, rates=(0.1,), private_rates=(0.1,), clips=(1.0,))
    found = study(single, failing)
    assert (found["rows"], found["base"], found["reasons"]) == ([], {}, ["failed: diverged"])
    assert [table.row_count for table in privacy_tables({"rows": found})] == [0]
    assert not goals_of({"rows": found})["epsilon_spent_over_budget"].met  # of nothing nothing is shown


@pytest.mark.parametrize("size", [FULL, QUICK, SMOLLM2], ids=["full", "quick", "smollm2"])
def test_no_trial_of_a_size_is_refused_and_units_are_its_parts(size: Size) -> None:
    setting, do = Setting("model", "rows.jsonl", size.flat, ""), Do()
    for part in size.parts:
        study(part, do)
    for trial in do.trials:
        config = setting.config(trial)  # raises where it is refused
        resolve(config)
        plan = resolve(config).privacy
        assert (plan is None) == (trial.labels["epsilon"] in UNBUDGETED)
        if plan is not None:
            unit = {SILOS: ("example", "local"), CLIENTS: ("client", "central")}[str(trial.labels["part"])]
            assert (plan.unit, plan.trust) == unit
            assert plan.epsilon == trial.labels["epsilon"]
            has_coins = plan.is_central and plan.epsilon != CLIPPED  # of clients; DP-SGD has its own for rows
            assert (plan.rate < 1) == has_coins


def tiny(epsilon: float, **keys: Scalar) -> Trial:
    flat: dict[str, Scalar] = {
        "federation.num-clients": 3,
        "data.partition": "column:domain",
        "data.held-out-fraction": 0.2,
        "aggregation.preset": "ffa",
        "lora.init-a": "orthonormal",
        "seed": 1,
        **({"privacy.epsilon": epsilon} if epsilon else {}),
        **keys,
    }
    return Trial("privacy", "private", {}, flat, {"audit_rows": 6})


@pytest.mark.parametrize(
    "keys",
    [
        {"privacy.unit": "example"},
        {
            "privacy.unit": "client",
            "aggregation.weighting": "uniform",
            "federation.selection": "poisson",
            "federation.cohort": 2,
            "federation.num-rounds": 4,  # one of them may be empty
            "privacy.delta": 1e-3,
        },
    ],
    ids=["example", "client"],
)
def test_a_private_cell_ends_within_its_budget_and_is_attacked(
    tiny_setting: Setting, keys: dict[str, Scalar]
) -> None:
    first, again = (private(tiny(8.0, **keys), tiny_setting) for _ in range(2))
    for found in (first, again):  # each counts for itself: the second is not refused, nor charged for both
        assert 0.9 * 8 < found["privacy"]["epsilon"] <= 8
        assert found["privacy"]["noise_multiplier"] > 0
        assert set(found["after"]) == {"code", "math", "news"}
        assert 0 <= found["membership"]["area"] <= 1
    assert first["before"] == again["before"]
    assert first["after"] != again["after"]  # another draw of the noise


def test_run_without_privacy_spends_nothing_and_repeats(tiny_setting: Setting) -> None:
    first, again = (private(tiny(0.0), tiny_setting) for _ in range(2))
    assert first == again
    assert first["privacy"] == {}
    assert first["membership"]["null_deviation"] == pytest.approx(math.sqrt((6 + 6 + 1) / (12 * 6 * 6)))


def test_what_is_learnt_by_heart_is_found(tiny_setting: Setting) -> None:
    keys: dict[str, Scalar] = {"lora.target-modules": "all-linear"}
    trials = [replace(tiny(0.0, **keys), kind="by heart", options={"epochs": epochs}) for epochs in (1, 60)]
    once, often = (by_heart(trial, tiny_setting)["membership"] for trial in trials)
    assert often["area"] > once["area"]
    assert often["area"] > 0.9
    assert once["base"] == often["base"]


def test_clipping_alone_is_nearly_free_of_noise(tiny_setting: Setting) -> None:
    keys: dict[str, Scalar] = {"privacy.unit": "client", "aggregation.weighting": "uniform"}
    found = private(tiny(CLIPPED, **keys), tiny_setting)
    assert 0 < found["privacy"]["noise_multiplier"] < 0.01
    assert found["after"] != found["before"]


@pytest.fixture(scope="module")
def done(
    tiny_setting: Setting, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Figures], str, TrialRunner]:
    """The figures of both parts, what was printed and where it was done."""
    runner = TrialRunner(tiny_setting, KINDS, tmp_path_factory.mktemp("work") / "trials.jsonl", "abc")
    printed = io.StringIO()
    parts = do_parts(TINY, runner, Console(file=printed, width=120))
    return parts, printed.getvalue(), runner


def test_both_parts_have_their_rows_their_goals_and_their_tables(
    done: tuple[dict[str, Figures], str, TrialRunner],
) -> None:
    parts, printed, _ = done
    assert [row["budget"] for row in parts[SILOS]["rows"]] == [8.0, NONE, BY_HEART]
    assert [row["budget"] for row in parts[CLIENTS]["rows"]] == [8.0, CLIPPED, NONE]
    assert parts[SILOS]["tuning"] == []  # a single choice is taken as it is
    assert len(parts[CLIENTS]["tuning"]) == 3
    goals = goals_of(parts)
    assert goals["epsilon_spent_over_budget"].met
    assert set(goals) == {
        "epsilon_spent_over_budget",
        *(f"rise_of_auc_by_privacy_over_its_error, {name}" for name in (SILOS, CLIENTS)),
    }
    for words in ("base model", "ffa, epsilon 8", "ffa, clipped alone", "ffa, no privacy"):
        assert words in printed
    json.dumps(report("privacy", {"parts": parts}, goals), allow_nan=False)


def test_parts_done_again_take_everything_from_the_journal(
    done: tuple[dict[str, Figures], str, TrialRunner],
) -> None:
    parts, _, runner = done
    fresh = TrialRunner(runner.setting, {}, runner.journal, "abc")  # no kind of trial could be done
    assert do_parts(TINY, fresh, Console(quiet=True)) == parts


def test_a_curve_is_drawn_for_every_part(
    done: tuple[dict[str, Figures], str, TrialRunner], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    draw(done[0], tmp_path)
    for name in (SILOS, CLIENTS):
        drawn = (tmp_path / f"privacy_{name}.svg").read_text()
        assert "epsilon 8" in drawn
        assert "clipped alone" not in drawn  # no point of the curve
