"""The whole guarantee of a run in one value: what is protected, from whom, by how much, how it is counted.

client   the unit is all a client ever sends. Its update of a round is clipped to C, and N(0, (zC)^2) is added
         central      by the server, once, to the sum; the sum is divided by a number fixed in advance
         local        by every client, to its own update: the server is not trusted
         distributed  by every client in a share, to a sum that a server sees whole or not at all
example  the unit is one row of one client. Every step of its training draws each row by a coin (Poisson),
         clips each row's gradient to C and adds N(0, (zC)^2) to their sum (DP-SGD, arXiv 1607.00133). All
         of it is done by the client, so the server is not trusted

Everything a server does with what has been noised is post-processing and costs nothing. What is counted as
sampling is what is done: coins where coins are tossed (`federation.selection = "poisson"`, DP-SGD), nothing
anywhere else.
"""

import math
from dataclasses import dataclass

from fedllm.config.key import number_or, split_number
from fedllm.config.keys import FederationConfig, PrivacyConfig, TrainConfig
from fedllm.errors import ConfigError
from fedllm.plan.cohort import CohortPlan
from fedllm.privacy.accounting import Charge, noise_for, rate_bound
from fedllm.privacy.distributed import SharedNoise, shared_noise
from fedllm.secure.parties import group_sizes, threshold_of
from fedllm.secure.ring import BITS

FEDERATION = "federation"  # the one account of a run that charges all clients alike


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """The guarantee (epsilon, delta) of a run and the mechanism that gives it.

    `clip` is C: of a client's update, or of one row's gradient. `noise_multiplier` is z, 0 where it is
    calibrated: the least that lets a unit take part `participations` times within the budget. A participation
    is `steps` releases: one update of a client, or its local steps. With a `limit` above 0 a client that has
    taken part so often is not asked again. `rate` is the probability of a client's coin (1 = no coins),
    `denominator` the number a noised sum is divided by. `batch_size` is the number of rows a step draws on
    average. `weight_cap` is the number of rows from which a client counts fully; 0 = all count alike.
    `metrics` says what else leaves a client.
    """

    epsilon: float
    delta: float
    unit: str = "example"
    trust: str = "local"
    clip: float = 1.0
    adaptive: bool = False
    noise_multiplier: float = 0.0
    participations: int = 1
    limit: int = 0
    steps: int = 1
    rate: float = 1.0
    denominator: float = 1.0
    batch_size: int = 1
    weight_cap: float = 0.0
    metrics: str = "withheld"

    @property
    def is_central(self) -> bool:
        """Whether the server adds the noise."""
        return self.trust == "central"

    @property
    def is_local_client(self) -> bool:
        """Whether every client adds the whole noise to its update."""
        return self.unit == "client" and self.trust == "local"

    @property
    def is_distributed(self) -> bool:
        """Whether every client adds a share of the noise to a secret sum."""
        return self.trust == "distributed"

    @property
    def has_capped_weights(self) -> bool:
        """Whether what a client adds to a noised sum is its clipped update times a weight of at most 1."""
        return self.is_central or self.is_distributed

    @property
    def is_by_example(self) -> bool:
        """Whether training itself is private (DP-SGD)."""
        return self.unit == "example"

    @property
    def largest_noise(self) -> float:
        """The most that a client's own noise adds to a value of its delta: 10 deviations."""
        # Of more the chance is 1.5e-23 a value.
        return 10 * self.multiplier() * self.clip if self.is_local_client else 0.0

    @property
    def relation(self) -> str:
        """Which two federations count as neighbours: their results must be hard to tell apart."""
        if self.is_by_example:
            # As many rows: their public number sets the client's weight, its sampling and its noise.
            return "zero-out: a client's rows, or as many of which one counts as nothing"
        if self.is_local_client:
            return "replace-one: any two updates of a client"
        return "add-or-remove-one: a client's updates, or zeros in their place"

    def multiplier(self, num_rows: int = 0) -> float:
        """Return z, given or calibrated; `num_rows` are the client's rows, where examples are the unit.

        It is the deviation over the clip, whatever the relation.
        """
        if self.noise_multiplier:
            return self.noise_multiplier
        needed = noise_for(self.epsilon, self.delta, rate=self._rate(num_rows), count=self.planned)
        return needed * self._sensitivity

    def charge(self, num_rows: int = 0) -> Charge:
        """Return what one participation costs a client of `num_rows` rows."""
        return Charge(self.multiplier(num_rows) / self._sensitivity, self._rate(num_rows), self.steps)

    def sampling_rate(self, num_rows: int) -> float:
        """Return the probability of a row's coin in a step of DP-SGD: exactly batch / rows, at most 1."""
        return min(1.0, self.batch_size / num_rows)  # fewer rows than a batch: all of them, every step

    def split_noise(self, z: float) -> tuple[float, float]:
        """Return (z of the sum, deviation of the count) where the clip is adaptive (arXiv 1905.03871).

        The count of clients within the clip is a second release, with deviation D / 20: a client within adds
        1/2 to it and one beyond takes 1/2 away, so its sensitivity is 1/2. Both together are one release of
        noise multiplier z.

        Raises:
            ConfigError: the count alone would take more than the whole budget.
        """
        count_deviation = self.denominator / 20  # the share that the paper recommends
        left = z**-2 - (2 * count_deviation) ** -2
        if left <= 0:
            raise ConfigError(
                f"privacy.clip = 'adaptive': with {self.denominator:g} clients a round and noise multiplier"
                f" {z:.3g} the noise on the count of clipped clients would hide it; use at least"
                f" {math.ceil(10 * z) + 1} clients a round, or a number"
            )
        return left**-0.5, count_deviation

    def shared_noise(self, *, num_values: int, num_parties: int) -> SharedNoise:
        """Return the share of the noise that each of `num_parties` adds to their sum of `num_values`.

        Raises:
            ConfigError: the sum's ring has no room for it.
        """
        return shared_noise(
            self.multiplier(),
            self.clip,
            num_values=num_values,
            num_parties=num_parties,
            threshold=threshold_of(num_parties),
            bits=BITS,
        )

    def noise_of_all(self, num_clients: int) -> float:
        """Return the deviation of the noise in a sum of `num_clients` that all answer, over z C.

        Shares are sized for the fewest answers of a secret sum, and where there are several groups each of
        their sums has the whole noise: it is opened alone.
        """
        if self.is_central:
            return 1.0
        if not self.is_distributed:
            return math.sqrt(num_clients)
        return math.sqrt(sum(size / threshold_of(size) for size in group_sizes(num_clients)))

    @property
    def planned(self) -> int:
        """How many releases of a unit the noise was calibrated for, 0 where it was given."""
        return 0 if self.noise_multiplier else self.participations * self.steps

    @property
    def _sensitivity(self) -> float:
        """Distance, in clips, of what two neighbours release: two updates may be opposite."""
        return 2.0 if self.is_local_client else 1.0

    def _rate(self, num_rows: int) -> float:
        if not self.is_by_example:
            return self.rate
        return rate_bound(self.sampling_rate(num_rows))


def privacy_plan(
    section: PrivacyConfig, train: TrainConfig, cohort: CohortPlan, federation: FederationConfig
) -> PrivacyPlan | None:
    """Return the privacy plan of a run, None where it has none (`privacy.epsilon = "off"`).

    Raises:
        ConfigError: the noise is to be added by nobody who can.
    """
    if isinstance(section.epsilon, str):  # "off"
        return None
    word, clip = split_number(section.clip, 1.0)
    by_example = section.unit == "example"
    automatic = "local" if by_example else "central"
    trust = automatic if section.trust == "auto" else section.trust
    if by_example and trust != "local":
        raise ConfigError(
            f"privacy.trust = {trust!r} cannot go with privacy.unit = 'example': only its client can bound"
            " what one row does; set privacy.trust = 'auto'"
        )
    rounds = federation.num_rounds
    # Noise that clients add themselves is counted without coins: the server knows who was drawn.
    has_coins = cohort.rule == "poisson" and trust == "central"
    plan = PrivacyPlan(
        epsilon=section.epsilon,
        delta=section.delta,
        unit=section.unit,
        trust=trust,
        clip=clip,
        adaptive=word == "adaptive",
        noise_multiplier=number_or(section.noise_multiplier, 0.0),
        participations=rounds if has_coins else number_or(section.max_participations, rounds),
        steps=train.local_steps if by_example else 1,
        rate=cohort.size / cohort.num_clients if has_coins else 1.0,
        denominator=float(cohort.size),  # expected, not met: who came must not change the divisor
        batch_size=train.batch_size,
        limit=number_or(section.max_participations, 0),
        weight_cap=number_or(section.weight_cap, 0.0),
        metrics=section.metrics if section.metrics != "auto" else ("held-out" if by_example else "withheld"),
    )
    if plan.rate < 1 and (plan.limit or federation.min_clients > 1):
        key = "privacy.max-participations" if plan.limit else "federation.min-clients"
        raise ConfigError(
            f"{key} cannot go with federation.selection = 'poisson' under privacy: what is counted is that a"
            f" client's own coin alone decides; leave {key} out, or set federation.selection = 'uniform'"
        )
    return plan
