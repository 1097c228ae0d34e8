"""A run's configuration, resolved once into what clients and server will do."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedllm.config.key import Scalar, number_or
from fedllm.config.run_config import RESUMABLE_KEYS, RunConfig
from fedllm.errors import ConfigError
from fedllm.messages import LocalTraining
from fedllm.plan.aggregation import AggregationRule, aggregation_rule
from fedllm.plan.cohort import CohortPlan, cohort_plan
from fedllm.plan.conflicts import check_combinations
from fedllm.plan.dealt_numbers import deal_ranks
from fedllm.plan.distillation import DistillationPlan, distillation_plan
from fedllm.plan.privacy import PrivacyPlan, privacy_plan
from fedllm.plan.training import PersonalTraining, local_training, personal_training


@dataclass(frozen=True)
class RunPlan:
    """A whole run, resolved: every fact that follows from several keys is computed here and nowhere else.

    `config` has the keys themselves, for what needs no resolving: the model, the data, deadlines. A part that
    the run does not use is None. `digest` is the SHA-256 (hex) of `fixed_keys`: the server and all nodes of
    one run have the same, also after a resume and under `with_own_model`.
    """

    config: RunConfig
    cohort: CohortPlan
    aggregation: AggregationRule
    privacy: PrivacyPlan | None
    personal: PersonalTraining | None
    distillation: DistillationPlan | None
    init_a: str  # how A is drawn: kaiming | orthonormal
    prompts: tuple[str, ...]  # public prompts answered before and after

    digest: str

    def with_own_model(self, path: str) -> "RunPlan":
        """Return the plan on a machine that has its own copy of the base model; `digest` stays the run's."""
        return replace(self, config=self.config.override({"model.name": path}))

    def ranks(self, client_ids: Iterable[str]) -> dict[str, int]:
        """Return the rank that `lora.client-ranks` gives each client, at most `lora.rank`."""
        return deal_ranks(self.config.lora.client_ranks, client_ids, self.config.lora.rank)

    def is_evaluated(self, round_num: int) -> bool:
        """Return whether a round, counted from 1, ends with held-out losses."""
        last = self.config.federation.num_rounds
        return round_num == last or round_num % number_or(self.config.evaluation.every, last) == 0

    def is_summed(self, ranks: Iterable[int]) -> bool:
        """Return whether a node answers for clients of these ranks with their sum: all have the run's."""
        return self.aggregation.node_sum and set(ranks) == {self.config.lora.rank}

    def training(self, round_num: int) -> LocalTraining:
        """Return how a client trains in a round, counted from 1."""
        return local_training(self.config, round_num)


def distillation_of(plan: RunPlan) -> DistillationPlan:
    """Return the distillation step of a run that has one."""
    assert plan.distillation is not None, "a run that never distils has no distillation step"
    return plan.distillation


def resolve(config: RunConfig) -> RunPlan:
    """Return the plan of a configuration whose values have been checked one by one.

    Raises:
        ConfigError: two values contradict each other, or would together not do what they say.
    """
    if not config.run.name or "/" in config.run.name or config.run.name.startswith("."):
        raise ConfigError(f"run.name = {config.run.name!r}: expected a plain folder name")
    cohort = cohort_plan(config.federation)
    rule, privacy = aggregation_rule(config), privacy_plan(config, cohort)
    distillation = distillation_plan(config, privacy)
    check_combinations(config, rule, privacy, distillation, cohort)
    return RunPlan(
        config=config,
        cohort=cohort,
        aggregation=rule,
        privacy=privacy,
        personal=personal_training(config.personal),
        distillation=distillation,
        init_a=_init_a(config),
        prompts=tuple(part.strip() for part in config.evaluation.prompts.split("||") if part.strip()),
        digest=hashlib.sha256(json.dumps(fixed_keys(config), sort_keys=True).encode()).hexdigest(),
    )


def fixed_keys(config: RunConfig) -> dict[str, Scalar]:
    """Return the keys that a round computes from: a run cannot go on with another value of any of them."""
    free = set(RESUMABLE_KEYS)
    if config.train.schedule == "cosine":  # the schedule stretches over the number of rounds
        free.discard("federation.num-rounds")
    if (
        config.privacy.epsilon != "off" and config.privacy.noise_multiplier == "auto"
    ):  # the noise was made for that number
        free.discard("federation.num-rounds")
    if config.distill.when != "never":  # they begin its synthetic texts
        free.discard("evaluation.prompts")
    return {key: value for key, value in config.to_flat().items() if key not in free}


def _init_a(config: RunConfig) -> str:
    """Return how A is drawn.

    Orthonormal rows under privacy: noise on B then has the same norm in the product B A.
    """
    if config.lora.init_a != "auto":
        return config.lora.init_a
    return "kaiming" if config.privacy.epsilon == "off" else "orthonormal"
