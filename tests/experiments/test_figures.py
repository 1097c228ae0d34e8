import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from fedllm.plan.run_plan import resolve
from fedllm.runs.records import AggregationRecord, RoundRecord, TrainingRecord
from scripts.experiments.aggregation.methods import (
    DIRICHLET,
    DOMAIN,
    ONE_SHOT,
    RANKS,
    MethodsGrid,
    chosen_rates,
    methods_study,
)
from scripts.experiments.aggregation.poison import (
    JUDGED,
    PoisonGrid,
    goals,
    honest_losses,
    poison_study,
)
from scripts.experiments.aggregation.rho_map import MapGrid, map_study, rank_correlation
from scripts.experiments.aggregation.sizes import FULL, QUICK, SMOLLM2, Size
from scripts.experiments.runs import figures_of, mean_of
from scripts.studies.trials import Figures, Outcome, Setting, Trial

BEST = {"x": 0.1, "y": 0.2, "local only": 0.2, "centralised": 0.1, ONE_SHOT: 0.1}


def figures(after: Mapping[str, float], **more: object) -> Figures:
    values = list(after.values())
    return {
        "before": dict.fromkeys(after, 5.0),
        "after": dict(after),
        "mean_before": 5.0,
        "mean_after": statistics.fmean(values),
        "worst_after": max(values),
        "spread_after": 0.0,
        "rho": [0.1, 0.3],
        "kept": [1.0, 1.0],
        "bytes_up": 8.0,
        "bytes_down": 16.0,
        "tokens": 100,
        "lost": 0,
        "lost_reasons": [],
        **more,
    }


def measured(num_tokens: int, rho: float) -> dict[str, Any]:
    return {
        "training": TrainingRecord(num_tokens=num_tokens),
        "aggregation": AggregationRecord(rho=rho),
    }


def test_figures_are_means_per_client_that_was_asked() -> None:
    records = [
        RoundRecord(round_num=0, held_out={"a": 4.0, "b": 2.0}),
        RoundRecord(round_num=1, asked=("a", "b"), bytes_up=20, bytes_down=40, **measured(7, 0.2)),
        RoundRecord(
            round_num=2,
            asked=("a", "b"),
            lost={"b": "gone"},
            bytes_up=10,
            bytes_down=90,  # an evaluation among them
            **measured(5, 0.4),
            held_out={"a": 3.0, "b": 2.0},
        ),
    ]
    found = figures_of(records)
    assert (found["mean_before"], found["mean_after"], found["worst_after"]) == (3.0, 2.5, 3.0)
    assert found["spread_after"] == 0.5
    assert (found["bytes_up"], found["bytes_down"], found["tokens"]) == (7.5, 20.0, 12)
    assert (found["lost"], found["lost_reasons"]) == (1, ["gone"])
    assert mean_of(found, "rho") == pytest.approx(0.3)
    assert math.isnan(mean_of(found, "kept"))


class Methods:
    """Does trials of study A by a formula: least loss at a method's best rate, more with the seed."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def __call__(self, trials: Sequence[Trial]) -> list[Outcome]:
        self.trials += trials
        return [self.outcome(trial) for trial in trials]

    def outcome(self, trial: Trial) -> Outcome:
        name, rate = str(trial.labels["method"]), float(trial.labels["rate"])
        if name == "z":
            return Outcome(trial, {}, "refused: unknown key")
        loss = 1.0 + abs(rate - BEST[name]) + 0.25 * int(trial.flat["seed"])
        return Outcome(trial, figures({"a": loss, "b": loss + 2.0}))


def test_rates_are_chosen_on_a_seed_that_is_not_reported() -> None:
    grid = MethodsGrid(
        flat={"federation.num-rounds": 3, "train.local-steps": 4},
        rates=(0.1, 0.2, 0.4),
        tuning_seed=0,
        seeds=(1, 2),
        methods={"x": {}, "y": {"aggregation.read-out": "factor-mean"}, "z": {}},
        dirichlet={"data.partition": "dirichlet:domain:0.3"},
        ranks={"lora.rank": 4},
        rank_methods=("y", "z"),
    )
    do = Methods()
    found = methods_study(grid, do)
    assert found["rates"] == BEST
    assert found["rate_at_edge"] == ["x", "centralised", ONE_SHOT]
    assert found["left_out"] == {"z": "refused: unknown key"}
    assert set(found["tables"]) == {DOMAIN, DIRICHLET, RANKS}
    assert set(found["tables"][RANKS]) == {"y"}
    assert ONE_SHOT not in found["tables"][DIRICHLET]
    row = found["tables"][DOMAIN]["x"]
    assert row["mean_after"]["mean"] == pytest.approx(1 + 0.25 * 1.5 + 1)
    assert row["mean_after"]["sd"] == pytest.approx(0.25 / math.sqrt(2))
    assert row["worst_after"]["mean"] == pytest.approx(1 + 0.25 * 1.5 + 2)
    assert (row["rho"], row["bytes_up"], row["seeds"]) == (0.2, 8.0, 2)
    reported = [trial for trial in do.trials if trial.flat["seed"] != 0]
    assert {float(trial.labels["rate"]) for trial in reported if trial.labels["method"] == "y"} == {0.2}
    one_shot = next(trial for trial in do.trials if trial.labels["method"] == ONE_SHOT)
    assert (one_shot.flat["federation.num-rounds"], one_shot.flat["train.local-steps"]) == (1, 12)


def test_a_single_rate_needs_no_tuning() -> None:
    do = Methods()
    grid = MethodsGrid(flat={}, rates=(0.1,), tuning_seed=0, seeds=(1,), methods={"x": {}}, controls=())
    assert set(methods_study(grid, do)["tables"][DOMAIN]) == {"x"}
    assert len(do.trials) == 1


def test_a_run_that_diverged_is_never_chosen() -> None:
    def outcome(rate: float, loss: float, reason: str = "") -> Outcome:
        return Outcome(Trial("s", "k", {"method": "x", "rate": rate}, {}), {"mean_after": loss}, reason)

    assert chosen_rates([outcome(1.0, math.inf), outcome(2.0, 3.0), outcome(3.0, 0.0, "failed: nan")]) == {
        "x": 2.0
    }


def test_the_map_pairs_runs_that_differ_in_their_read_out_only() -> None:
    def do(trials: Sequence[Trial]) -> list[Outcome]:
        made = []
        for trial in trials:
            rho = 0.01 * int(trial.labels["clients"]) * int(trial.labels["steps"])
            loss = 2.0 + (rho if trial.labels["read-out"] == "factor-mean" else 0.0)
            made.append(Outcome(trial, figures({"a": loss}, rho=[rho, rho])))
        return made

    grid = MapGrid({}, clients=(2, 7), local_steps=(2, 8), rates=(0.1,), skews=("iid", "domain"), seeds=(1,))
    found = map_study(grid, do)
    assert len(found["points"]) == 8
    assert all(point["gap"] == pytest.approx(point["rho"]) for point in found["points"])
    assert found["summary"]["rank_correlation"] == pytest.approx(1.0)
    assert found["summary"]["axes"]["clients"]["7"]["rho"] == pytest.approx(0.07 * 5)
    assert {name: band["points"] for name, band in found["summary"]["bands"].items()} == {
        "below 0.1": 2,
        "0.1 to 0.3": 4,
        "0.3 and above": 2,
    }
    partitions = {trial["skew"]: trial for trial in found["points"]}
    assert set(partitions) == {"iid", "domain"}


def test_rank_correlation_is_that_of_the_ranks_with_ties_shared() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 2], [5, 6, 7]) == pytest.approx(
        statistics.correlation([1.5, 1.5, 3], [1, 2, 3])
    )
    assert rank_correlation([1, 1], [1, 2]) == 0.0


def test_only_honest_clients_count_against_an_attack() -> None:
    attacked = figures({"a": 2.2, "b": 4.4, "bad": 99.0}, attackers=["bad"])
    clean = figures({"a": 2.0, "b": 4.0, "bad": 1.0})
    assert honest_losses(attacked, clean) == pytest.approx((3.3, 3.0, 5.0))


def test_the_goal_of_a_rule_is_its_worst_judged_attack() -> None:
    def do(trials: Sequence[Trial]) -> list[Outcome]:
        made = []
        for trial in trials:
            number = int(trial.options["malicious"])
            loss = 2.0 if trial.labels["rule"] == "good" else 2.0 * (1 + number)
            bad = trial.labels["rule"] == "none" and number == 2
            success = {"backdoor": {"probes": 1}} if trial.options.get("rows") == "backdoor" else {}
            made.append(
                Outcome(trial, {}, "failed: destroyed")
                if bad
                else Outcome(trial, figures({"a": loss, "b": loss}, attackers=["b"], **success))
            )
        return made

    grid = PoisonGrid(
        flat={},
        skews=("iid",),
        attacks={JUDGED[0]: (1, 2), "labels": (1,)},
        rules={"none": {}, "good": {}, "poor": {}},
        seed=1,
        backdoors={"": (1,)},
    )
    found = poison_study(grid, do)
    assert found["worst"] == pytest.approx({"none": 0.0, "good": 1.0, "poor": 1 / 3})
    assert {name: goal.met for name, goal in goals(found).items()} == {
        "clean_over_attacked_good": True,
        "clean_over_attacked_poor": False,
        "clean_over_huge_flip_good": True,
        "clean_over_huge_flip_poor": False,
    }
    assert found["tables"]["iid"]["huge flip x2"]["none"] == {"reason": "failed: destroyed"}
    good, poor = (found["backdoors"]["iid"]["backdoor x1"][rule] for rule in ("good", "poor"))
    assert (good["ratio"], good["gain"]) == (1.0, 1.0)  # of the clean run without a rule, which ends at 2
    assert (poor["ratio"], poor["gain"]) == (2.0, pytest.approx(1 / 3))


@pytest.mark.parametrize("size", [FULL, QUICK, SMOLLM2], ids=["full", "quick", "smollm2"])
def test_no_cell_of_a_scale_is_refused_by_the_configuration(size: Size) -> None:
    setting = Setting("model", "rows.jsonl", size.flat, "")
    trials: list[Trial] = []

    def do(some: Sequence[Trial]) -> list[Outcome]:
        trials.extend(some)
        success = {"backdoor": {}, "attackers": []}
        return [
            Outcome(trial, figures({"a": 1.0 + float(trial.flat["train.learning-rate"])}, **success))
            for trial in some
        ]

    methods_study(size.methods, do)
    map_study(size.rho_map, do)
    if size.poison is not None:
        poison_study(size.poison, do)
    for trial in trials:
        config = setting.config(trial)  # raises where it is refused
        resolve(config)
