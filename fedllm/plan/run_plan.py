"""A run's configuration, resolved once into what clients and server will do."""

from dataclasses import dataclass

from fedllm.config.keys import RunConfig
from fedllm.errors import ConfigError
from fedllm.messages import LocalTraining
from fedllm.plan.aggregation import AggregationRule, aggregation_rule
from fedllm.plan.cohort import CohortPlan, cohort_plan
from fedllm.plan.conflicts import check_combinations
from fedllm.plan.distillation import DistillationPlan, distillation_plan
from fedllm.plan.privacy import PrivacyPlan, privacy_plan
from fedllm.plan.training import PersonalTraining, local_training, personal_training


@dataclass(frozen=True)
class RunPlan:
    """A whole run, resolved: every fact that follows from several keys is computed here and nowhere else.

    `config` has the keys themselves, for what needs no resolving: the model, the data, deadlines. A part that
    the run does not use is None.
    """

    config: RunConfig
    cohort: CohortPlan
    aggregation: AggregationRule
    privacy: PrivacyPlan | None
    personal: PersonalTraining | None
    distillation: DistillationPlan | None
    init_a: str  # how A is drawn: kaiming | orthonormal
    prompts: tuple[str, ...]  # public prompts answered before and after

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
    )


def _init_a(config: RunConfig) -> str:
    """Return how A is drawn.

    Orthonormal rows under privacy: noise on B then has the same norm in the product B A.
    """
    if config.lora.init_a != "auto":
        return config.lora.init_a
    return "orthonormal" if config.privacy.epsilon else "kaiming"
