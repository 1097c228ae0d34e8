"""How a round's clients are chosen: the rule and its numbers, resolved from the keys of `federation`."""

import math
from dataclasses import dataclass

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
    # At least one client: a small fraction of few clients would round to nobody.
    size = federation.cohort_size or max(1, round(federation.cohort_fraction * num_clients))
    if size > num_clients:
        raise ConfigError(f"federation.cohort-size = {size} is above federation.num-clients = {num_clients}")
    if federation.min_clients > size:
        raise ConfigError(f"federation.min-clients = {federation.min_clients} is above the cohort of {size}")
    cohort = CohortPlan(
        rule=federation.selection,
        size=size,
        num_clients=num_clients,
        over_selection=federation.over_selection,
        candidates=federation.candidates,
        preferred_seconds=federation.preferred_seconds,
    )
    if cohort.rule == "power-of-choice" and 0 < cohort.candidates < cohort.num_asked:
        raise ConfigError(
            f"federation.candidates = {cohort.candidates} is below the {cohort.num_asked} clients asked"
        )
    return cohort
