"""How client updates become one adapter: one point of the grid of federated LoRA methods, checked when built.

Two axes span the grid: which factor clients train (`train`), and how the server reads their products out
(`read_out`). Weighting, a robust rule and a server optimizer go on top. A combination that is not defined, or
that would not do what its name says, is refused with the reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from fedllm.adapters.parts import returned_part
from fedllm.config.key import named_values, number_or, split_number
from fedllm.config.keys import PRESETS, AggregationConfig
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.dealt_numbers import are_mixed

COORDINATE_RULES = frozenset({"trimmed-mean", "coordinate-median"})  # they compare single coordinates
CHANGES_BASE = frozenset({"residual", "stack"})  # read-outs that add to the base model itself
# Published values: FedOpt (arXiv 2003.00295) and DiLoCo (arXiv 2311.08105).
LEARNING_RATES = {"fedavg": 1.0, "fedavgm": 1.0, "nesterov": 0.7}
ADAPTIVE_LEARNING_RATE = 1e-3
MAX_MALICIOUS = 0.2  # of a round's clients, where aggregation.robust names no share

PRIVATE_PRESET = "ffa"  # of a run with differential privacy that names no rule of its own
_DEFAULT_AXES = ("both", "svd", "")  # train, read-out and preset where none is named


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """What the server does with a round's change (`strategies/aggregation/optimizers.py`).

    `learning_rate` 0 stands for the optimizer's published one.
    """

    name: str = "fedavg"
    learning_rate: float = 0.0
    momentum: float = 0.9
    second_moment: float = 0.99
    adaptivity: float = 1e-4

    def __post_init__(self) -> None:
        if not (
            0 <= self.momentum <= 0.9999 and 0 <= self.second_moment <= 0.9999 and 0 < self.adaptivity < 1e9
        ):
            raise ConfigError(
                "aggregation.optimizer: expected momentum and second-moment from 0 to 0.9999 and adaptivity"
                " above 0"
            )

    @property
    def rate(self) -> float:
        """The learning rate in use."""
        return self.learning_rate or LEARNING_RATES.get(self.name, ADAPTIVE_LEARNING_RATE)

    @property
    def is_plain(self) -> bool:
        """Whether the read-out is the next adapter as it is."""
        return self.name == "fedavg" and self.rate == 1.0


@dataclass(frozen=True, kw_only=True)
class AggregationRule:
    """A whole rule. `max_malicious` is the largest share of a round's clients that is assumed to attack.

    `base_bits` (32, 8 or 4), `mixed_ranks` and `node_sum` say what the rule will meet: a quantized base
    model, clients of different ranks, nodes that answer with one sum for all of their clients.
    """

    train: str = "both"
    read_out: str = "svd"
    weighting: str = "examples"
    robust: str = "none"
    max_malicious: float = MAX_MALICIOUS
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    base_bits: int = 32
    mixed_ranks: bool = False
    node_sum: bool = False

    def __post_init__(self) -> None:
        for reason in _contradictions(self):
            raise ConfigError(reason)

    def trained_in(self, round_num: int) -> str:
        """Return what clients train in a round: "both", "a" or "b" (RoLoRA: B in odd rounds, A in even)."""
        if self.train != "alternate":
            return self.train
        return "b" if round_num % 2 else "a"

    def returned_in(self, round_num: int) -> str:
        """Return the part of a delta that leaves a client: what it trained, but no B of its own."""
        return returned_part(self.trained_in(round_num), self.local_b)

    @property
    def local_b(self) -> bool:
        """Whether every client keeps a B of its own, which never leaves it."""
        return self.read_out == "local-b"

    @property
    def changing_part(self) -> str:
        """The part of the server's adapter that a run ever changes; the rest stays as it began."""
        if self.local_b:
            return "a"
        return "both" if self.train == "alternate" else self.train

    @property
    def needs_products(self) -> bool:
        """Whether clients' products matter; where one factor is common to all, the mean needs none."""
        return self.train == "both" and not self.local_b and not self.node_sum

    @property
    def holds_updates(self) -> bool:
        """Whether every update of a round must be kept until its last has come."""
        return self.robust != "none"


def preset_axes(name: str, *, train: str, read_out: str, weighting: str) -> tuple[str, str, str]:
    """Return (train, read-out, weighting) of a preset, or as given where `name` is "".

    Raises:
        ConfigError: the preset is unknown, or an axis is neither its default nor the preset's.
    """
    if not name:
        return train, read_out, weighting
    if name not in PRESETS:
        raise ConfigError(f"aggregation.preset = {name!r}: expected one of {', '.join(PRESETS)}")
    defaults = AggregationRule()
    given = {"train": train, "read-out": read_out, "weighting": weighting}
    usual = {"train": defaults.train, "read-out": defaults.read_out, "weighting": defaults.weighting}
    for (axis, value), wanted in zip(given.items(), PRESETS[name], strict=False):
        if wanted and value not in (wanted, usual[axis]):
            raise ConfigError(
                f"aggregation.{axis} = {value!r} contradicts aggregation.preset = {name!r}, which is"
                f" {wanted!r}; leave one of them out"
            )
    chosen = PRESETS[name]
    return chosen[0], chosen[1], chosen[2] or weighting


def _contradictions(rule: AggregationRule) -> Iterator[str]:
    """Yield why a rule cannot be; a rule that must not meet another one belongs here, with its reason."""
    train, read_out = f"aggregation.train = {rule.train!r}", f"aggregation.read-out = {rule.read_out!r}"
    robust, weighting = f"aggregation.robust = {rule.robust!r}", f"aggregation.weighting = {rule.weighting!r}"
    optimizer = f"aggregation.optimizer = {rule.optimizer.name!r}"
    ranks = "clients of different ranks"
    if rule.train != "both" and rule.read_out == "local-b":
        yield f"{train}: read-out local-b trains both factors and shares A; use both"
    if rule.train != "both" and rule.read_out != "factor-mean":
        yield f"{read_out}: where one factor is common to all, its mean is already exact; use factor-mean"
    if rule.read_out in CHANGES_BASE and rule.base_bits < 32:
        yield (
            f"{read_out} adds to the base model, and {rule.base_bits}-bit weights cannot hold the sum;"
            " use svd"
        )
    if rule.read_out in CHANGES_BASE and not rule.optimizer.is_plain:
        yield (
            f"{optimizer} at server learning rate {rule.optimizer.rate:g}: read-out {rule.read_out} adds the"
            " round's own change to the base model, which no other step size would match and no momentum can"
            " follow; use fedavg with aggregation.server-learning-rate = auto"
        )
    needs_each = rule.read_out != "factor-mean" or rule.robust != "none" or rule.weighting == "product-norm"
    if rule.node_sum and needs_each:
        yield (
            f"wire.node-sum = true: {read_out}, {robust} and {weighting} need every client's own factors;"
            " use factor-mean, no robust rule and another weighting, or wire.node-sum = false"
        )
    if rule.node_sum and rule.mixed_ranks:
        yield f"wire.node-sum = true: {ranks} have no common sum; leave lora.client-ranks empty"
    is_fedit = rule.train == "both" and rule.read_out == "factor-mean" and rule.weighting != "product-norm"
    if rule.mixed_ranks and is_fedit:
        yield (
            f"{read_out} pads {ranks} with zeros, which shrinks what only some of them train; use svd, or"
            " aggregation.preset = hetlora, which weights for it"
        )
    if rule.mixed_ranks and rule.robust in COORDINATE_RULES:
        yield f"{robust}: {ranks} do not share all coordinates; use geometric-median"
    if rule.robust in COORDINATE_RULES and rule.train == "both":
        yield (
            f"{robust} compares single coordinates, which mean nothing while both factors are free: B G and"
            " G^-1 A are the same adapter for any G; use aggregation.train = b, or geometric-median"
        )
    if rule.local_b and (rule.robust != "none" or rule.weighting == "product-norm"):
        yield f"{read_out} never shows the server a product B A, which {robust}, {weighting} would measure"
    if rule.robust != "none" and rule.weighting == "product-norm":
        yield f"{weighting} counts a client more the larger its update, which {robust} exists to prevent"


def server_optimizer(section: AggregationConfig) -> ServerOptimizer:
    """Return the optimizer that `aggregation.optimizer` names, such as "fedadam:second-moment=0.95".

    Raises:
        ConfigError: a constant is unknown, no number or out of range.
    """
    name, _, text = section.optimizer.partition(":")
    named = named_values("aggregation.optimizer", text, ("momentum", "second-moment", "adaptivity"))
    try:
        constants = {constant.replace("-", "_"): float(value) for constant, value in named.items()}
    except ValueError as error:
        raise ConfigError(f"aggregation.optimizer = {section.optimizer!r}: {error}") from None
    rate = number_or(section.server_learning_rate, 0.0)
    return ServerOptimizer(name=name, learning_rate=rate, **constants)


def aggregation_rule(config: RunConfig) -> AggregationRule:
    """Return the aggregation rule of a run, its preset resolved.

    Under privacy the rule of a recipe that names none is FFA-LoRA: with A fixed the noise on B enters the
    product once and linearly, while noise on both factors would be multiplied with one another.

    Raises:
        ConfigError: the preset contradicts an axis, or the rule itself.
    """
    given = config.aggregation
    preset, asked_weighting = given.preset, given.weighting
    if config.privacy.epsilon != "off" and (given.train, given.read_out, preset) == _DEFAULT_AXES:
        preset = PRIVATE_PRESET
        is_capped = config.privacy.weight_cap != "off" or config.privacy.unit == "example"
        asked_weighting = asked_weighting if is_capped or asked_weighting != "examples" else "uniform"
    train, read_out, weighting = preset_axes(
        preset, train=given.train, read_out=given.read_out, weighting=asked_weighting
    )
    robust, max_malicious = split_number(given.robust, MAX_MALICIOUS)
    return AggregationRule(
        train=train,
        read_out=read_out,
        weighting=weighting,
        robust=robust,
        max_malicious=max_malicious,
        optimizer=server_optimizer(given),
        base_bits={"none": 32, "8bit": 8, "4bit": 4}[config.model.quantization],
        mixed_ranks=are_mixed(config.lora.client_ranks, config.lora.rank),
        node_sum=config.wire.node_sum,
    )
