"""Choices that cannot go together, each refused with the reason."""

import math
from typing import TYPE_CHECKING

from fedllm.errors import ConfigError
from fedllm.rule import aggregation_rule

if TYPE_CHECKING:
    from fedllm.config import RunConfig


def check_combinations(config: "RunConfig", cohort_size: int) -> None:
    """Refuse a config whose parts contradict each other, or would together not do what they say.

    Raises:
        ConfigError: naming the keys and why they cannot go together.
    """
    _check_selection(config, cohort_size)
    if config.federation.max_staleness:
        _check_staleness(config)
    if config.train.control_variates:
        _check_control_variates(config)


def _check_selection(config: "RunConfig", cohort_size: int) -> None:
    federation = config.federation
    num_asked = math.ceil(cohort_size * federation.over_selection)
    if federation.selection == "poisson" and federation.over_selection > 1:
        raise ConfigError(
            "federation.over-selection needs a cohort of a fixed size, and federation.selection = 'poisson'"
            " has none: keeping only the first to answer would be another law; set it to 1"
        )
    if federation.selection == "power-of-choice" and 0 < federation.candidates < num_asked:
        raise ConfigError(
            f"federation.candidates = {federation.candidates} is below the {num_asked} clients a round asks"
        )


def _check_staleness(config: "RunConfig") -> None:
    key = f"federation.max-staleness = {config.federation.max_staleness}"
    rule = aggregation_rule(config)
    if config.federation.selection == "poisson":
        raise ConfigError(f"{key}: a poisson round waits for everyone it drew, so none is late; set it to 0")
    if rule.read_out != "factor-mean":
        raise ConfigError(
            f"{key} needs aggregation.read-out = 'factor-mean': other read-outs change the factors' basis or"
            " the base model between rounds, and a late change of the factors means nothing there"
        )
    if rule.train == "alternate":
        raise ConfigError(
            f"{key} cannot go with aggregation.train = 'alternate': a late update is of the other factor"
        )
    if config.train.control_variates:
        raise ConfigError(f"{key} cannot go with train.control-variates, which assume updates of one round")


def _check_control_variates(config: "RunConfig") -> None:
    rule = aggregation_rule(config)
    if not config.train.clip_norm:
        raise ConfigError(
            "train.control-variates needs train.clip-norm above 0: it bounds what one client may add to them"
        )
    if rule.read_out != "factor-mean" or rule.train == "alternate":
        raise ConfigError(
            "train.control-variates needs aggregation.read-out = 'factor-mean' and one part that is trained"
            " in every round: they are gradients of the factors, in a basis that must stay"
        )
    if rule.robust != "none":
        raise ConfigError(
            f"train.control-variates cannot go with aggregation.robust = {rule.robust!r}, which does not see"
            " what a client adds to them"
        )
    if rule.node_sum or rule.mixed_ranks:
        raise ConfigError(
            "train.control-variates needs every client's own change at the run's rank; set wire.node-sum ="
            " false and leave lora.client-ranks empty"
        )
