"""How a round's clients are chosen: the rule and its numbers, resolved from the keys of `federation`."""

import math
from dataclasses import dataclass

from fedllm.config.key import number_or, split_number
from fedllm.config.keys import FederationConfig
from fedllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CohortPlan:
    """How clients are chosen; `candidates` 0 = twice the cohort, `preferred_seconds` 0 = ignore speed."""

    rule: str
    size: int
    num_clients: int  # of the federation, whether free or not
    over_selection: float = 1.0
    candidates: int = 0
    preferred_seconds: float = 0.0

    @property
    def num_asked(self) -> int:
        """The cohort and its over-selection (Bonawitz et al. 2019, 130 %)."""
        return math.ceil(self.size * self.over_selection)


def cohort_plan(federation: FederationConfig) -> CohortPlan:
    """Return how a run chooses the clients of a round.

    Raises:
        ConfigError: the cohort is larger than the federation, or smaller than the updates a round needs;
            power-of-choice draws fewer candidates than the round asks.
    """
    num_clients = federation.num_clients
    rule, number = split_number(federation.selection, 0.0)
    if rule == "power-of-choice" and number % 1:
        raise ConfigError(f"federation.selection = {federation.selection!r}: expected whole candidates")
    size = number_or(federation.cohort, num_clients)
    if isinstance(size, float):
        if size > 1:
            raise ConfigError(
                f"federation.cohort = {size}: expected a whole number of clients, or a share up to 1"
            )
        size = max(1, round(size * num_clients))  # a small share of few clients would round to nobody
    if size > num_clients:
        raise ConfigError(f"federation.cohort = {size} is above federation.num-clients = {num_clients}")
    if federation.min_clients > size:
        raise ConfigError(f"federation.min-clients = {federation.min_clients} is above the cohort of {size}")
    cohort = CohortPlan(
        rule=rule,
        size=size,
        num_clients=num_clients,
        over_selection=federation.over_selection,
        candidates=int(number) if rule == "power-of-choice" else 0,
        preferred_seconds=number if rule == "oort" else 0.0,
    )
    if 0 < cohort.candidates < cohort.num_asked:
        raise ConfigError(
            f"federation.selection = {federation.selection!r} names fewer candidates than the"
            f" {cohort.num_asked} clients a round asks"
        )
    return cohort
