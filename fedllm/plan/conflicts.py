"""Choices that cannot go together, each refused with the reason."""

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.originality.overlap import MAX_SHINGLES, MAX_TEXTS
from fedllm.plan.aggregation import AggregationRule
from fedllm.plan.cohort import CohortPlan
from fedllm.plan.dealt_numbers import parse_repeats
from fedllm.plan.distillation import DistillationPlan
from fedllm.plan.privacy import PrivacyPlan
from fedllm.plan.refusals import check_privacy


def check_combinations(
    config: RunConfig,
    rule: AggregationRule,
    privacy: PrivacyPlan | None,
    distillation: DistillationPlan | None,
    cohort: CohortPlan,
) -> None:
    """Refuse a config whose parts contradict each other, or would together not do what they say.

    The parts have each been checked for themselves.

    Raises:
        ConfigError: naming the keys and why they cannot go together.
    """
    if rule.train == "a":
        raise ConfigError(
            "aggregation.train = 'a': a run starts from B = 0, where the gradient of A is 0 and stays so, and"
            " nothing would ever be learnt; use alternate, which trains both in turn, or b"
        )
    _check_selection(config, cohort)
    if config.federation.max_staleness:
        _check_staleness(config, rule)
    if config.train.control_variates:
        _check_control_variates(config, rule)
    check_privacy(config, rule, privacy)
    if distillation is not None:
        _check_distillation(config, rule)
        if distillation.is_screened:
            _check_screening(distillation)
    _check_canaries(config)
    if config.personal.mode != "none" and rule.local_b:
        raise ConfigError(
            f"personal.mode = {config.personal.mode!r}: under aggregation.read-out = 'local-b' every client"
            " has a B of its own, so no adapter is shared that a personal one could go on top of; use none"
        )


def _check_canaries(config: RunConfig) -> None:
    parse_repeats(config.audit.canary_repeats)
    if config.audit.canaries and config.audit.canary_tokens > config.train.max_length:
        raise ConfigError(
            f"audit.canary-tokens = {config.audit.canary_tokens} is above train.max-length ="
            f" {config.train.max_length}: a canary is a row like any other; make it shorter"
        )


def _check_selection(config: RunConfig, cohort: CohortPlan) -> None:
    federation, num_asked = config.federation, cohort.num_asked
    if federation.selection == "poisson" and federation.over_selection > 1:
        raise ConfigError(
            "federation.over-selection needs a cohort of a fixed size, and federation.selection = 'poisson'"
            " has none: keeping only the first to answer would be another law; set it to 1"
        )
    if 0 < cohort.candidates < num_asked:
        raise ConfigError(
            f"federation.selection = {federation.selection!r} names fewer candidates than the {num_asked}"
            " clients a round asks"
        )


def _check_staleness(config: RunConfig, rule: AggregationRule) -> None:
    key = f"federation.max-staleness = {config.federation.max_staleness}"
    if config.federation.selection == "poisson":
        raise ConfigError(f"{key}: a poisson round waits for everyone it drew, so none is late; set it to 0")
    if rule.read_out not in ("factor-mean", "local-b"):
        raise ConfigError(
            f"{key} needs aggregation.read-out = 'factor-mean' or 'local-b': any other turns the factors'"
            " basis or changes the base model every round, and a late change was made on the old one"
        )
    if rule.train == "alternate":
        raise ConfigError(
            f"{key}: under aggregation.train = 'alternate' a late change of one factor may come in a round"
            " that combines the other; set it to 0"
        )
    if rule.node_sum:
        raise ConfigError(
            f"{key}: under wire.node-sum a node answers once its last client is done, so one slow client"
            " would make all of its node's late; leave one of them out"
        )
    if config.train.control_variates:
        raise ConfigError(f"{key} cannot go with train.control-variates, which assume updates of one round")


def _check_control_variates(config: RunConfig, rule: AggregationRule) -> None:
    if config.train.clip_norm == "off":
        raise ConfigError(
            "train.control-variates needs train.clip-norm above 0: it bounds what one client may add to them"
        )
    if rule.read_out != "factor-mean":
        raise ConfigError(
            "train.control-variates needs aggregation.read-out = 'factor-mean': they are gradients of factors"
            " that all share, and any other read-out turns their basis, changes the base model beneath them"
            " or keeps B with the clients"
        )
    if rule.train != "both":
        raise ConfigError(
            f"train.control-variates needs aggregation.train = 'both', not {rule.train!r}: c and every c_i"
            " are gradients of both factors"
        )
    if rule.mixed_ranks:
        raise ConfigError(
            "train.control-variates cannot go with lora.client-ranks: no c_i has the columns its client does"
            " not train, so their mean is not the gradient of any loss; leave one of them out"
        )
    if rule.node_sum:
        raise ConfigError(
            "train.control-variates cannot go with wire.node-sum: the change of every client's own would"
            " travel beside the sum that is to replace it; leave one of them out"
        )
    if rule.robust != "none":
        raise ConfigError(
            f"train.control-variates cannot go with aggregation.robust = {rule.robust!r}: what it leaves"
            " out of the adapter would still enter the control variates; leave one of them out"
        )


def _check_distillation(config: RunConfig, rule: AggregationRule) -> None:
    key = f"distill.when = {config.distill.when!r}"
    if not config.distill.text.strip():
        raise ConfigError(
            "distill.text is empty: without public text and without synthetic text there is nothing to distil"
            " on; set it to synthetic, to a source such as data.source takes, or to synthetic+SOURCE"
        )
    if rule.node_sum:
        raise ConfigError(
            f"{key} cannot go with wire.node-sum: the teachers are the clients' own adapters, and a sum hides"
            " them; leave one of them out"
        )
    if rule.local_b:
        raise ConfigError(
            f"{key} cannot go with aggregation.read-out = 'local-b': the server never sees a B, so it has no"
            " client's adapter to learn from; use another read-out"
        )
    if config.distill.gate == "clients" and not config.data.held_out_fraction * config.data.max_held_out:
        raise ConfigError(
            "distill.gate = 'clients' needs rows that clients keep for evaluation: set data.held-out-fraction"
            " and data.max-held-out above 0, or use public"
        )


def _check_screening(plan: DistillationPlan) -> None:
    """Refuse what one overlap query, all that a round has, cannot ask of the data holders."""
    number, most = plan.num_screened, plan.numbers.max_tokens
    if number > MAX_TEXTS:
        raise ConfigError(
            f"distill.num-texts = {plan.numbers.num_texts} has {number} synthetic texts written, and data"
            f" holders can be asked about {MAX_TEXTS} a round; lower it, or set distill.originality = off"
        )
    if number and most > MAX_SHINGLES:
        raise ConfigError(
            f"distill.max-tokens = {most} is above the {MAX_SHINGLES} of which data holders can be asked in"
            " one synthetic text; lower it, or set distill.originality = off"
        )
