"""Secret sums in a run's plan: the rule they choose, and what they hide."""

from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve

MASKS = {"secure.method": "masks"}


def test_a_run_without_secret_sums_has_no_plan_of_them() -> None:
    assert resolve(RunConfig()).secure is None


def test_a_rule_that_nobody_named_is_exact_on_the_sum_alone() -> None:
    rule = resolve(RunConfig.from_flat(MASKS)).aggregation
    assert (rule.train, rule.read_out) == ("alternate", "factor-mean")
    private = resolve(RunConfig.from_flat({**MASKS, "privacy.epsilon": 8.0})).aggregation
    assert (private.train, private.read_out) == ("b", "factor-mean")
    named = resolve(RunConfig.from_flat({**MASKS, "aggregation.preset": "fedit"})).aggregation
    assert (named.train, named.read_out) == ("both", "factor-mean")


def test_nodes_may_sum_their_clients_first() -> None:
    plan = resolve(RunConfig.from_flat({**MASKS, "wire.node-sum": True, "federation.num-clients": 2}))
    assert plan.secure is not None
    assert plan.secure.min_parties == 3


def test_a_round_of_too_few_clients_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"secure\.min-parties = 3: a round asks 2 clients"):
        resolve(RunConfig.from_flat({**MASKS, "federation.cohort": 2}))


@pytest.mark.parametrize(
    "keys",
    [
        {"aggregation.read-out": "svd", "aggregation.preset": "flexlora"},
        {"aggregation.robust": "multi-krum", "aggregation.preset": "fedit"},
        {"aggregation.weighting": "product-norm", "aggregation.preset": "fedit"},
        {"aggregation.preset": "fedsa"},
        {"distill.when": "last"},
        {"train.control-variates": True, "aggregation.preset": "fedit"},
        {"federation.max-staleness": 1, "aggregation.preset": "fedit"},
        {"federation.selection": "oort"},
        {"federation.selection": "power-of-choice", "federation.cohort": 4},
        {"federation.selection": "poisson", "federation.cohort": 4},
        {"federation.over-selection": 1.5},
        {"evaluation.every": "train"},
        {"lora.client-ranks": "4,8"},
        {"privacy.epsilon": 8.0, "privacy.unit": "client"},
    ],
)
def test_what_needs_a_clients_own_update_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"secure\.method = 'masks'") as caught:
        resolve(RunConfig.from_flat({**MASKS, **keys}))
    assert "\n" not in str(caught.value)
