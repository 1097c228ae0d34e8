"""A run's configuration, resolved once into what clients and server will do."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedllm.config.key import Scalar
from fedllm.config.keys import PRESETS, AuditConfig, LoraConfig
from fedllm.config.run_config import RESUMABLE_KEYS, RunConfig
from fedllm.data.licences import parse_licences
from fedllm.errors import ConfigError
from fedllm.messages import LocalTraining
from fedllm.plan.aggregation import AXES, AggregationRule, aggregation_rule
from fedllm.plan.capabilities import Part, active_parts, refuse_conflicts
from fedllm.plan.cohort import CohortPlan, cohort_plan
from fedllm.plan.dealt_numbers import CANARY_TOKENS, are_mixed, deal_ranks, named_clients, parse_canaries
from fedllm.plan.distillation import DistillationPlan, distillation_plan
from fedllm.plan.privacy import PrivacyPlan, privacy_plan
from fedllm.plan.secure import SecurePlan, secure_plan
from fedllm.plan.training import (
    HomeTraining,
    PersonalTraining,
    home_training,
    local_training,
    personal_training,
)
from fedllm.privacy.distributed import SharedNoise

# A file system has room for 255, of which the names of private state and unfinished files take up to 55.
MOST_NAME_BYTES = 200


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
    secure: SecurePlan | None
    personal: PersonalTraining | None
    at_home: HomeTraining | None
    distillation: DistillationPlan | None
    init_a: str  # how A is drawn: kaiming | orthonormal
    prompts: tuple[str, ...]  # public prompts answered before and after

    digest: str

    def with_own_model(self, path: str) -> "RunPlan":
        """Return the plan on a machine that has its own copy of the base model; `digest` stays the run's."""
        return replace(self, config=self.config.override({"model.name": path}))

    def clients_with_own_rank(self) -> set[str]:
        """Return the clients that `lora.client-ranks` names."""
        return set(named_clients(self.config.lora.client_ranks, self.config.lora.rank))

    def ranks(self, client_ids: Iterable[str]) -> dict[str, int]:
        """Return the rank that `lora.client-ranks` gives each client, at most `lora.rank`."""
        return deal_ranks(self.config.lora.client_ranks, client_ids, self.config.lora.rank)

    def is_evaluated(self, round_num: int) -> bool:
        """Return whether a round, counted from 1, ends with the nodes being asked for held-out losses."""
        every = self.config.evaluation.every
        is_last = round_num == self.config.federation.num_rounds
        return is_last or (isinstance(every, int) and round_num % every == 0)

    def shared_noise(self, *, num_values: int, num_parties: int) -> SharedNoise | None:
        """Return the noise that each party of a secret sum adds to its delta, None where it adds none."""
        if self.privacy is None or not self.privacy.is_distributed:
            return None
        return self.privacy.shared_noise(num_values=num_values, num_parties=num_parties)

    @property
    def measures_in_training(self) -> bool:
        """Whether clients report, next to an update, the held-out loss of the adapter they started from."""
        withheld = self.privacy is not None and self.privacy.metrics == "withheld"
        return self.config.evaluation.every == "train" and not withheld

    @property
    def only_measures(self) -> bool:
        """Whether no round is done: the adapter that the run starts from is measured, and the run ends."""
        return self.config.evaluation.every == "only"

    def is_summed(self, ranks: Iterable[int]) -> bool:
        """Return whether a node answers for clients of these ranks with their sum: all have the run's."""
        return self.aggregation.node_sum and set(ranks) == {self.config.lora.rank}

    def training(self, round_num: int) -> LocalTraining:
        """Return how a client trains in a round, counted from 1."""
        train, num_rounds = self.config.train, self.config.federation.num_rounds
        return local_training(train, self.config.lora.dropout, round_num=round_num, num_rounds=num_rounds)

    def most_tokens(self, round_num: int) -> int:
        """Return the most tokens that a client can learn from in a round."""
        training = self.training(round_num)
        return training.steps * training.batch_size * self.config.train.max_length

    def in_use(self) -> dict[str, Scalar]:
        """Return every key that has an effect in this run, with the value in use.

        A preset, privacy or "auto" may have replaced the value that was given.
        """
        rule, privacy = self.aggregation, self.privacy
        axes = zip(AXES, (rule.train, rule.read_out, rule.weighting), strict=True)
        keys = {**self.config.to_flat(), **dict(axes), "lora.init-a": self.init_a}
        # A rate of 1 leaves the mean as it is, however it is written.
        unused = ["aggregation.optimizer"] if rule.optimizer.is_plain else []
        if privacy is None:
            unused += ["privacy.unit", "privacy.trust", "privacy.metrics", "privacy.weight-cap"]
        else:
            keys |= {"privacy.trust": privacy.trust, "privacy.metrics": privacy.metrics}
            # Only in a noised sum weights must not exceed what the noise was sized for.
            unused += [] if privacy.has_capped_weights or privacy.weight_cap else ["privacy.weight-cap"]
        if self.distillation is None:
            unused += ["distill.gate", "distill.originality"]
        if not are_mixed(self.config.lora.client_ranks, self.config.lora.rank):
            unused.append("lora.client-ranks")
        return {key: value for key, value in keys.items() if key not in unused}

    def parts(self) -> list[Part]:
        """Return what the run's settings need and hide, for `refuse_conflicts`."""
        given, in_use, preset = self.config.to_flat(), self.in_use(), self.config.aggregation.preset
        if preset:
            axes = zip(AXES, PRESETS[preset], strict=False)
            by = {axis: "aggregation.preset" for axis, value in axes if value}
        else:
            source = "privacy.epsilon" if self.privacy is not None else "secure.method"
            by = {axis: source for axis in AXES if in_use[axis] != given[axis]}
        return list(active_parts(in_use, by))


def distillation_of(plan: RunPlan) -> DistillationPlan:
    """Return the distillation step of a run that has one."""
    assert plan.distillation is not None, "a run that never distils has no distillation step"
    return plan.distillation


def resolve(config: RunConfig) -> RunPlan:
    """Return the plan of a configuration whose values have been checked one by one.

    Raises:
        ConfigError: two values contradict each other, or would together not do what they say.
    """
    run, data, federation = config.run, config.data, config.federation
    _check_name(run.name)
    _check_canaries(config.audit, config.train.max_length)
    parse_licences(data.licences)
    cohort = cohort_plan(federation)
    node_sum = config.wire.node_sum
    secure = secure_plan(config.secure, cohort, node_sum=node_sum)
    rule = aggregation_rule(
        config.aggregation, config.privacy, node_sum=node_sum, is_secret=secure is not None
    )
    privacy = privacy_plan(config.privacy, config.train, cohort, federation)
    distillation = distillation_plan(
        config.distill,
        privacy,
        num_rounds=federation.num_rounds,
        holds_out=data.held_out_fraction * data.max_held_out > 0,
    )
    plan = RunPlan(
        config=config,
        cohort=cohort,
        aggregation=rule,
        privacy=privacy,
        secure=secure,
        personal=personal_training(config.personal),
        at_home=home_training(
            config.personal,
            local_training(config.train, config.lora.dropout, round_num=1, num_rounds=federation.num_rounds),
            num_rounds=federation.num_rounds,
            is_reported=privacy is None or privacy.metrics == "all",
        ),
        distillation=distillation,
        init_a=_init_a(config.lora.init_a, is_private=privacy is not None),
        prompts=tuple(part.strip() for part in config.evaluation.prompts.split("||") if part.strip()),
        # JSON with sorted keys is the same text on every machine.
        digest=hashlib.sha256(json.dumps(fixed_keys(config), sort_keys=True).encode()).hexdigest(),
    )
    _check_padding(rule, config.lora, preset=config.aggregation.preset)
    refuse_conflicts(plan.parts())
    return plan


def _check_name(name: str) -> None:
    """Refuse a name that leads out of `run.output`, is hidden, looks like an option or cannot be read."""
    is_plain = name.isprintable() and not set(name) & set("/\\") and name == name.strip()
    if not name or not is_plain or name[0] in ".-":
        raise ConfigError(
            f"run.name = {name[:80]!r}: expected a plain folder name, without slashes, control characters or"
            " spaces at its ends, that begins with neither '.' nor '-'"
        )
    if (size := len(name.encode())) > MOST_NAME_BYTES:
        raise ConfigError(
            f"run.name is {size} bytes long, and a folder's name has room for {MOST_NAME_BYTES}; shorten it"
        )


def _check_padding(rule: AggregationRule, lora: LoraConfig, *, preset: str) -> None:
    pads = (rule.train, rule.read_out) == ("both", "factor-mean") and rule.weighting != "product-norm"
    if pads and are_mixed(lora.client_ranks, lora.rank):
        source = f"aggregation.preset = {preset!r}" if preset else "aggregation.read-out = 'factor-mean'"
        exact = "aggregation.preset = 'flexlora'" if preset else "aggregation.read-out = 'svd'"
        raise ConfigError(
            f"lora.client-ranks = {lora.client_ranks!r} cannot go with {source}, which fills smaller ranks up"
            f" with zeros and so shrinks what only some clients train; set {exact}, or aggregation.preset ="
            " 'hetlora', which weighs for it"
        )


def _init_a(given: str, *, is_private: bool) -> str:
    if given != "auto":
        return given
    # Rows at right angles: noise on B then has the same norm in the product B A.
    return "orthonormal" if is_private else "kaiming"


def _check_canaries(audit: AuditConfig, max_length: int) -> None:
    number, _ = parse_canaries(audit.canaries)
    if number and max_length < CANARY_TOKENS:
        raise ConfigError(
            f"audit.canaries = {audit.canaries}: a canary has {CANARY_TOKENS} tokens and train.max-length"
            f" = {max_length} cuts it; raise that"
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


def check_nodes_agree(config: RunConfig, given: RunConfig) -> None:
    """Refuse to run `config` over nodes that were given another configuration.

    Raises:
        ConfigError: a key that rounds compute from differs.
    """
    theirs = fixed_keys(given)
    for key, value in fixed_keys(config).items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"{key} = {value!r}: the nodes were given {theirs.get(key)!r} and compute with it; set it in"
                " the configuration that they are given too"
            )


def check_one_exchange(plan: RunPlan) -> None:
    """Refuse a round loop that sends one message a round, and no second one to open a secret sum.

    Raises:
        ConfigError: the run has secret sums.
    """
    if plan.secure is not None:
        raise ConfigError("secure.method: Flower's own round loop cannot open a secret sum; use `start`")
