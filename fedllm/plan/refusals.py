"""Choices under which a privacy guarantee would be false, each refused with the reason."""

from collections.abc import Iterator

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.aggregation import AggregationRule
from fedllm.plan.privacy import PrivacyPlan


def check_privacy(config: RunConfig, rule: AggregationRule, plan: PrivacyPlan | None) -> None:
    """Refuse a config whose privacy guarantee would not hold, or is not built.

    Raises:
        ConfigError: naming the keys and why they cannot go together.
    """
    if plan is None:
        for reason in _without_plan(config):
            raise ConfigError(reason)
        return
    for reasons in (
        _of_every_plan(config, rule),
        _of_distillation(config, plan),
        _of_unit(config, rule, plan),
    ):
        for reason in reasons:
            raise ConfigError(reason)


def _without_plan(config: RunConfig) -> Iterator[str]:
    section = config.privacy
    if section.noise_multiplier != "auto":
        yield "privacy.noise-multiplier needs privacy.epsilon: the budget at which the run stops"
    if isinstance(section.clip, str):
        yield f"privacy.clip = {section.clip!r} needs privacy.epsilon; nothing is clipped without a budget"


def _of_every_plan(config: RunConfig, rule: AggregationRule) -> Iterator[str]:
    if config.train.control_variates:
        yield (
            "train.control-variates cannot go with privacy.epsilon: the change of a control variate is a"
            " second message that nothing clips or noises; leave one of them out"
        )
    if rule.local_b:
        yield (
            "aggregation.read-out = 'local-b' cannot go with privacy.epsilon: what a client sends of A would"
            " depend on a B that no clip and no noise has touched; use aggregation.preset = ffa"
        )
    if config.federation.max_staleness:
        yield (
            "federation.max-staleness cannot go with privacy.epsilon: a late update counts in a round that"
            " did not draw its client, and is charged to none; set it to 0"
        )
    if rule.weighting == "tokens":
        yield (
            "aggregation.weighting = 'tokens' cannot go with privacy.epsilon: the tokens of the rows that"
            " were drawn are a count of private data that nothing noises; use examples or uniform"
        )
    if config.federation.selection.startswith(("power-of-choice", "oort")):
        yield (
            f"federation.selection = {config.federation.selection!r} cannot go with privacy.epsilon: it"
            " chooses by losses, which are private; use uniform or poisson"
        )


def _of_distillation(config: RunConfig, plan: PrivacyPlan) -> Iterator[str]:
    if config.distill.when != "never" and plan.is_central:
        yield (
            f"distill.when = {config.distill.when!r} cannot go with privacy.trust = 'central': a step would"
            " learn from every client's own adapter, and only their noised sum may leave the round; use"
            " never, or privacy.trust = local"
        )
    if config.distill.when != "never" and config.distill.originality == "on":
        yield (
            "distill.originality = 'on' asks data holders how much of a text they have, counts that nothing"
            " noises; use auto, as what private adapters write is private already"
        )
    if config.distill.when != "never" and config.distill.gate == "clients" and plan.metrics == "withheld":
        yield (
            "distill.gate = 'clients' asks for held-out losses, which privacy.metrics = 'withheld' keeps with"
            " the clients; use distill.gate = public, or privacy.metrics = held-out"
        )


def _of_unit(config: RunConfig, rule: AggregationRule, plan: PrivacyPlan) -> Iterator[str]:
    federation, section = config.federation, config.privacy
    if plan.trust == "distributed":
        yield (
            "privacy.trust = 'distributed': a client's part of the noise protects nothing until the server"
            " sees only a masked sum, which is not built yet; use central or local"
        )
    if plan.adaptive and not plan.is_central:
        yield (
            f"privacy.clip = {section.clip!r} needs privacy.unit = 'client' and privacy.trust = 'central':"
            " the share of clipped clients is a count that only a trusted server can noise once for all"
        )
    if plan.weight_cap and not plan.is_central:
        yield "privacy.weight-cap bounds weights under a central client-level sum only; set it to off"
    if plan.limit and plan.rate < 1:
        yield (
            "privacy.max-participations cannot go with federation.selection = 'poisson': a coin that is no"
            " longer tossed for some is not the coin that was counted; set it to all"
        )
    if plan.is_by_example:
        return
    if plan.is_central:
        yield from _of_a_central_sum(config, rule, plan)
    if federation.over_selection > 1:
        yield (
            "federation.over-selection cannot go with privacy.unit = 'client': who answers first depends on"
            " how much a client computes, hence on its data; set it to 1"
        )


def _of_a_central_sum(config: RunConfig, rule: AggregationRule, plan: PrivacyPlan) -> Iterator[str]:
    needs = "under privacy.unit = 'client' the server keeps one noised sum of all updates"
    if rule.read_out != "factor-mean":
        yield (
            f"aggregation.read-out = {rule.read_out!r}: {needs}, and this one needs the product of each; use"
            " aggregation.preset = ffa, rolora or fedit"
        )
    if rule.robust != "none":
        yield (
            f"aggregation.robust = {rule.robust!r}: {needs}; one client would change what is left to all the"
            " others, which no clip bounds; use none"
        )
    if rule.weighting == "examples" and not plan.weight_cap:
        yield (
            "aggregation.weighting = 'examples': an uncapped weight multiplies the clip of its client; set"
            " privacy.weight-cap to the rows from which a client counts fully, or use uniform"
        )
    if rule.weighting not in ("examples", "uniform"):
        yield (
            f"aggregation.weighting = {rule.weighting!r}: a weight must be fixed before training and at most"
            " 1; use uniform, or examples with privacy.weight-cap"
        )
    if rule.weighting == "uniform" and plan.weight_cap:
        yield "privacy.weight-cap needs aggregation.weighting = 'examples'; set it to off"
    if rule.node_sum:
        yield (
            f"wire.node-sum = true: {needs}, each of which it clips once more; the sum of a node hides them;"
            " use wire.node-sum = false"
        )
    if rule.mixed_ranks:
        yield (
            f"lora.client-ranks: {needs}, divided by one number; columns that only some train would need"
            " another; leave it empty"
        )
    if config.federation.selection == "weighted":
        yield (
            "federation.selection = 'weighted' cannot go with privacy.unit = 'client': who takes part would"
            " depend on how many rows a client has; use poisson or uniform"
        )
    if plan.rate < 1 and config.federation.min_clients > 1:
        yield (
            "federation.min-clients above 1 cannot go with privacy and federation.selection = 'poisson': one"
            " client's coin would decide whether all others count; set it to 1"
        )
