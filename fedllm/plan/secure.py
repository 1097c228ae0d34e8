"""How a run hides each client's update from the server: by which method, and among how many clients.

The method decides who opens the sum of a round. What the sum hides is in `fedllm.plan.capabilities`, the
arithmetic in `fedllm.secure`.
"""

from dataclasses import dataclass

from fedllm.config.keys import SecureConfig
from fedllm.errors import ConfigError
from fedllm.plan.cohort import CohortPlan
from fedllm.secure.parties import MOST_TOGETHER


@dataclass(frozen=True, kw_only=True)
class SecurePlan:
    """The sum of a run's rounds: `method` is masks, shares or he.

    A party is a client, or under `wire.node-sum` a node. Nothing is summed among fewer than `min_parties`.
    """

    method: str
    min_parties: int

    @property
    def is_blind(self) -> bool:
        """Whether the server passes boxes on and knows no sum, and so no adapter, until the run is over."""
        return self.method == "shares"

    @property
    def withstands_lies(self) -> bool:
        """Whether a server that breaks the protocol learns no single update either: not under he."""
        return self.method != "he"


def secure_plan(section: SecureConfig, cohort: CohortPlan, *, node_sum: bool) -> SecurePlan | None:
    """Return how a run's updates are summed in secret, None where the server sees each (`none`).

    Raises:
        ConfigError: a round asks too few clients to hide one among them, or by shares not all of them.
    """
    if section.method == "none":
        return None
    if not node_sum and cohort.size < section.min_parties:  # how many nodes there are is not known yet
        raise ConfigError(
            f"secure.min-parties = {section.min_parties}: a round asks {cohort.size:g} clients; raise"
            " federation.cohort or federation.num-clients"
        )
    if section.method == "shares" and not cohort.num_clients == cohort.size <= MOST_TOGETHER:
        raise ConfigError(
            "secure.method = 'shares': who sits a round out would miss its adapter, and all are in one sum;"
            f" set federation.cohort = 'all' and federation.num-clients to at most {MOST_TOGETHER}, or"
            " secure.method = 'masks'"
        )
    return SecurePlan(method=section.method, min_parties=section.min_parties)
