"""Words and the numbers that follow them, as the plan has them."""

from dataclasses import replace
from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.plan.run_plan import RunPlan, resolve


def planned(**keys: Any) -> RunPlan:
    return resolve(
        RunConfig.from_flat({name.replace("__", ".").replace("_", "-"): keys[name] for name in keys})
    )


@pytest.mark.parametrize(
    ("cohort", "size"), [("all", 8), (5, 5), ("5", 5), (1, 1), (1.0, 8), (0.25, 2), ("0.01", 1)]
)
def test_a_cohort_is_a_number_or_a_share(cohort: Any, size: int) -> None:
    assert planned(federation__cohort=cohort).cohort.size == size


def test_a_selection_rule_brings_its_number() -> None:
    power = planned(federation__selection="power-of-choice:8").cohort
    assert (power.rule, power.candidates, power.preferred_seconds) == ("power-of-choice", 8, 0.0)
    oort = planned(federation__selection="oort:30").cohort
    assert (oort.rule, oort.candidates, oort.preferred_seconds) == ("oort", 0, 30.0)
    plain = planned(federation__selection="oort").cohort
    assert (plain.rule, plain.preferred_seconds) == ("oort", 0.0)


def test_a_pull_is_of_the_factors_or_of_their_product() -> None:
    factor = planned(train__proximal=0.5, train__clip_norm="off").training(1)
    assert (factor.proximal, factor.proximal_space, factor.clip_norm) == (0.5, "factor", 0.0)
    product = planned(train__proximal="product:0.5").training(1)
    assert (product.proximal, product.proximal_space, product.clip_norm) == (0.5, "product", 1.0)


def test_a_personal_mode_brings_its_pull() -> None:
    pulls = {}
    for mode in ("dual", "ditto", "ditto:pull=2"):
        personal = planned(personal__mode=mode).personal
        assert personal is not None
        pulls[mode] = personal.pull
    assert pulls == {"dual": 0.0, "ditto": 0.1, "ditto:pull=2": 2.0}


def test_training_at_home_is_as_in_the_first_round_but_for_a_pull() -> None:
    keys = {"personal__mode": "finetune", "personal__steps": 10, "train__proximal": 0.1}
    run = planned(**keys, train__local_steps=3, federation__num_rounds=5, train__schedule="cosine")
    assert run.personal is None
    assert run.at_home is not None
    assert run.at_home.training == replace(run.training(1), steps=10, proximal=0.0)
    assert [run.at_home.steps_alone(4 * steps) for steps in (0, 7, 15, 10**9)] == [10, 17, 25, 25]
    assert run.at_home.most == 35
    own = planned(personal__mode="finetune:0.02").at_home
    assert own is not None
    assert own.training.learning_rate == 0.02
    assert planned().at_home is None


def test_losses_of_home_leave_where_all_numbers_may() -> None:
    private = {"personal__mode": "finetune", "privacy__epsilon": 8.0}
    told = {
        metrics: planned(**private, privacy__metrics=metrics).at_home
        for metrics in ("withheld", "held-out", "all")
    }
    assert [home is not None and home.is_reported for home in told.values()] == [False, False, True]


def test_an_aggregation_rule_brings_its_numbers() -> None:
    rule = planned(
        aggregation__robust="multi-krum:0.3",
        aggregation__optimizer="fedadam:learning-rate=0.1,second-moment=0.5,adaptivity=1e-2",
    ).aggregation
    assert (rule.robust, rule.max_malicious) == ("multi-krum", 0.3)
    optimizer = rule.optimizer
    assert (optimizer.name, optimizer.rate) == ("fedadam", 0.1)
    assert (optimizer.momentum, optimizer.second_moment, optimizer.adaptivity) == (0.9, 0.5, 1e-2)
    plain = planned(aggregation__robust="multi-krum", aggregation__optimizer="nesterov").aggregation
    assert (plain.max_malicious, plain.optimizer.rate) == (0.2, 0.7)


def test_a_privacy_plan_has_numbers_for_words() -> None:
    assert planned().privacy is None
    private = {"privacy__epsilon": 8, "privacy__unit": "client", "federation__num_clients": 100}
    plan = planned(**private).privacy
    assert plan is not None
    assert (plan.clip, plan.adaptive, plan.noise_multiplier) == (1.0, False, 0.0)
    assert (plan.participations, plan.limit, plan.weight_cap) == (3, 0, 0.0)
    plan = planned(**private, privacy__clip="adaptive:0.5", privacy__max_participations=2).privacy
    assert plan is not None
    assert (plan.clip, plan.adaptive, plan.participations, plan.limit) == (0.5, True, 2, 2)
