"""A plan owns its guarantee: what it counts, and what it refuses with the reason."""

import math
from dataclasses import replace
from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.privacy import PrivacyPlan
from fedllm.plan.run_plan import resolve
from fedllm.privacy.accounting import Charge, epsilon_of, gaussian_epsilon
from fedllm.privacy.ledger import Entry, Ledger, ledger_from_dict, ledger_to_dict
from fedllm.runs.privacy_statement import in_words, statement_of

CLIENT = {"privacy.epsilon": 8.0, "privacy.unit": "client"}
LOCAL = {**CLIENT, "privacy.trust": "local"}
POISSON = {**CLIENT, "federation.selection": "poisson", "federation.cohort": 4}
EXAMPLE = {"privacy.epsilon": 8.0}


def planned(flat: dict[str, Any]) -> PrivacyPlan:
    plan = resolve(RunConfig.from_flat(flat)).privacy
    assert plan is not None
    return plan


def test_a_budget_alone_is_a_plan() -> None:
    config = RunConfig.from_flat({"privacy.epsilon": 8})
    plan, rule = resolve(config).privacy, resolve(config).aggregation
    assert plan is not None
    assert (plan.unit, plan.trust, plan.metrics) == ("example", "local", "held-out")
    assert (rule.train, rule.read_out, resolve(config).init_a) == ("b", "factor-mean", "orthonormal")
    assert resolve(RunConfig()).privacy is None
    assert (resolve(RunConfig()).aggregation.read_out, resolve(RunConfig()).init_a) == ("svd", "kaiming")


def test_a_recipe_may_say_otherwise() -> None:
    config = RunConfig.from_flat({**EXAMPLE, "aggregation.preset": "flexlora", "lora.init-a": "kaiming"})
    assert (resolve(config).aggregation.read_out, resolve(config).init_a) == ("svd", "kaiming")


@pytest.mark.parametrize("flat", [CLIENT, LOCAL, EXAMPLE, POISSON])
def test_calibrated_noise_spends_the_budget_and_no_more(flat: dict[str, Any]) -> None:
    plan = planned({**flat, "federation.num-rounds": 5})
    charge = plan.charge(400)
    spent = epsilon_of([Charge(charge.noise_multiplier, charge.rate, charge.count * 5)], plan.delta)
    assert 0.99 * 8 <= spent <= 8


def test_what_a_participation_costs() -> None:
    fixed = {"privacy.noise-multiplier": 3.0}
    assert planned({**CLIENT, **fixed}).charge() == Charge(3.0, 1.0, 1)
    assert planned({**LOCAL, **fixed}).charge() == Charge(1.5, 1.0, 1)  # opposite updates are 2 clips apart
    assert planned({**POISSON, **fixed}).charge() == Charge(3.0, 0.5, 1)
    example = planned({**EXAMPLE, **fixed, "train.local-steps": 7, "train.batch-size": 4})
    charge = example.charge(400)
    assert (charge.noise_multiplier, charge.count) == (3.0, 7)
    assert 0.01 <= charge.rate <= 0.0105
    assert example.charge(3).rate == 1.0  # fewer rows than a batch: every row in every step


SHARES = PrivacyPlan(epsilon=3.6052, delta=1e-3, unit="client", trust="distributed", participations=20)


def test_shares_of_noise_cost_what_central_noise_costs() -> None:
    central = replace(SHARES, trust="central")
    assert SHARES.charge() == central.charge()
    assert SHARES.multiplier() == pytest.approx(4.0, rel=1e-3)
    noise = SHARES.shared_noise(num_values=2000, num_parties=9)
    assert noise.threshold == 6
    assert SHARES.multiplier() <= noise.multiplier
    assert SHARES.relation == central.relation


def test_all_that_answer_add_more_noise_than_planned() -> None:
    assert SHARES.noise_of_all(10) == math.sqrt(10 / 7)
    assert SHARES.noise_of_all(100) == math.sqrt(100 / 67)
    assert SHARES.noise_of_all(130) == pytest.approx(
        math.sqrt(44 / 30 + 2 * 43 / 29)
    )  # three sums, each opened alone
    assert replace(SHARES, trust="central").noise_of_all(10) == 1
    assert replace(SHARES, trust="local").noise_of_all(16) == 4


def test_a_statement_says_what_colluding_holders_know() -> None:
    statement = statement_of(SHARES, Ledger(), num_clients=8, num_rounds=1)
    assert "discrete Gaussian" in statement["mechanism"]
    assert any("collude" in item for item in statement["does_not_cover"])


def test_fixed_size_and_shuffled_rows_count_as_no_sampling() -> None:
    plan = planned({**CLIENT, "federation.cohort": 2, "privacy.noise-multiplier": 4.0})
    assert plan.rate == 1.0
    assert "no amplification" in statement_of(plan, Ledger(), num_clients=8, num_rounds=1)["sampling"]
    assert planned({**LOCAL, "federation.selection": "poisson", "federation.cohort": 2}).rate == 1.0


def test_rows_are_hidden_among_as_many_rows() -> None:
    """Their number weighs a client and sets its noise, so no neighbour has another."""
    plan = planned({**EXAMPLE, "privacy.noise-multiplier": 4.0})
    few, many = plan.charge(50), plan.charge(400)
    assert few.rate > many.rate
    statement = statement_of(plan, Ledger(), num_clients=8, num_rounds=1)
    assert statement["relation"].startswith("zero-out: ")
    assert "neighbours have as many rows" in statement["does_not_cover"][0]
    clients = statement_of(planned(CLIENT), Ledger(), num_clients=8, num_rounds=1)
    assert clients["relation"].startswith("add-or-remove-one: ")
    assert "neighbours" not in clients["does_not_cover"][0]


def test_adaptive_clipping_splits_one_release_in_two() -> None:
    """Both together are one release of z: 1/z^2 = 1/z_sum^2 + 1/(2 sigma_b)^2 (arXiv 1905.03871)."""
    plan = planned({**CLIENT, "federation.num-clients": 1000, "privacy.clip": "adaptive"})
    z_sum, deviation = plan.split_noise(2.0)
    assert deviation == 1000 / 20
    assert z_sum**-2 + (2 * deviation) ** -2 == pytest.approx(2.0**-2)
    assert z_sum > 2.0
    few = planned({**CLIENT, "privacy.clip": "adaptive"})
    with pytest.raises(ConfigError, match=r"use at least 21 clients a round"):
        few.split_noise(2.0)


ALLOWED = [
    {**CLIENT, "aggregation.preset": "rolora", "aggregation.weighting": "uniform"},
    {**CLIENT, "privacy.weight-cap": 50.0},
    {**CLIENT, "aggregation.optimizer": "fedadam"},
    {**EXAMPLE, "aggregation.preset": "fedex"},  # of deltas that are private already all is post-processing
    {**EXAMPLE, "aggregation.preset": "fedit", "aggregation.robust": "geometric-median"},
    {**EXAMPLE, "federation.over-selection": 1.5, "federation.selection": "weighted"},
    {**LOCAL, "aggregation.preset": "flexlora"},
    {**EXAMPLE, "wire.node-sum": True},
    {**EXAMPLE, "distill.when": "last", "distill.gate": "clients"},
    {**LOCAL, "distill.when": "last"},
]


@pytest.mark.parametrize("flat", ALLOWED)
def test_what_is_post_processing_or_bounded_is_allowed(flat: dict[str, Any]) -> None:
    assert planned(flat).epsilon == 8


def entry(round_num: int, attempt: int, release: str, **counts: int) -> Entry:
    return Entry(round_num, attempt, release, {name: Charge(2.0, 1.0, n) for name, n in counts.items()})


def test_a_release_made_again_is_charged_once() -> None:
    ledger = Ledger().with_entry(entry(1, 1, "x", anna=1))
    assert ledger.with_entry(entry(1, 1, "x", anna=1)) is ledger
    for other in (entry(1, 2, "x", anna=1), entry(1, 1, "y", anna=1), entry(2, 1, "x", anna=1)):
        twice = ledger.with_entry(other)
        assert twice.charges_of("anna") == (Charge(2.0, 1.0, 2),)
        assert twice.epsilon(1e-5) == pytest.approx(gaussian_epsilon(math.sqrt(2) / 2, 1e-5))


def test_the_ledger_reports_the_account_that_spent_most() -> None:
    ledger = Ledger((entry(1, 1, "", anna=1, ben=1), entry(2, 1, "", anna=1)))
    assert ledger.epsilon(1e-5) == epsilon_of([Charge(2.0, 1.0, 2)], 1e-5)
    assert ledger.charges_of("cleo") == ()
    assert Ledger().epsilon(1e-5) == 0.0


def test_the_ledger_reports_the_largest_of_unlike_accounts() -> None:
    """A client of many rows with little noise may spend more than small ones whose loss varies more."""
    pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
    large = Charge(0.42, 0.0016, 80)
    small = {f"small {count}": Charge(4.15, 0.5, count) for count in (16, 24, 32)}
    ledger = Ledger((Entry(1, 1, "", {**small, "large": large}),))
    each = [epsilon_of([charge], 1e-5) for charge in (large, *small.values())]
    assert max(each) == each[0] > 1.2 * each[-1]
    assert ledger.epsilon(1e-5) == each[0]
    check = ledger.renyi_check(1e-5)
    assert check is not None
    assert check >= each[0]


def test_an_account_pays_once_for_one_release() -> None:
    ledger = Ledger().with_entry(entry(1, 1, "x", anna=1, ben=1)).with_entry(entry(1, 1, "x", ben=1, cleo=1))
    assert [ledger.charges_of(name)[0].count for name in ("anna", "ben", "cleo")] == [1, 1, 1]
    assert len(ledger.entries) == 1
    assert Ledger().with_all(ledger).with_all(ledger) == ledger


def test_a_ledger_survives_its_json_and_joins_with_another() -> None:
    ledger = Ledger((entry(1, 1, "a", anna=3), entry(3, 1, "b", ben=1)))
    assert ledger_from_dict(ledger_to_dict(ledger)) == ledger
    journal = Ledger((*ledger.entries, entry(4, 1, "c", anna=1)))
    assert ledger.with_all(journal) == journal
    assert journal.with_all(ledger) == journal


def test_a_budget_is_checked_with_what_is_asked_for_included() -> None:
    ledger = Ledger((entry(1, 1, "", anna=1),))
    two = epsilon_of([Charge(2.0, 1.0, 2)], 1e-5)
    ask = Charge(2.0, 1.0, 1)
    assert ledger.affords("anna", ask, epsilon=two * 1.0001, delta=1e-5, planned=0)
    assert not ledger.affords("anna", ask, epsilon=two * 0.9999, delta=1e-5, planned=0)
    assert ledger.affords("anna", ask, epsilon=0.1, delta=1e-5, planned=2)  # known to be within it
    assert not ledger.affords("anna", ask, epsilon=0.1, delta=1e-5, planned=1)
    assert ledger.affords("ben", ask, epsilon=two, delta=1e-5, planned=0)


@pytest.mark.parametrize("flat", [CLIENT, LOCAL, EXAMPLE, {**EXAMPLE, "privacy.metrics": "all"}])
def test_a_statement_says_what_an_epsilon_needs_to_mean_anything(flat: dict[str, Any]) -> None:
    plan = planned(flat)
    ledger = Ledger((Entry(1, 1, "x", {"anna": plan.charge(400)}),))
    statement = statement_of(plan, ledger, num_clients=8, num_rounds=1)
    text = in_words(plan, statement)
    assert 0 < statement["epsilon"] <= plan.epsilon
    assert statement["epsilon"] <= statement["epsilon_renyi_check"] * 1.0001
    for word in (f"{statement['epsilon']:g}", "1e-05", plan.relation, "Not covered", "clip"):
        assert word in text
    listed = " ".join(statement["does_not_cover"])
    assert ("training losses" in listed) == (plan.metrics == "all")
    assert ("held" in listed.replace("held-out rows", "")) == (plan.metrics != "withheld")
    assert "number of training and of held-out rows" in listed
