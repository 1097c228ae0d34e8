"""How client updates become one adapter: one point of the grid of federated LoRA methods.

Two axes span the grid: which factor clients train (`train`), and how the server reads their products out
(`read_out`). Weighting, a robust rule and a server optimizer go on top. What each of them cannot go with
follows from `fedllm/plan/capabilities.py`.
"""

from dataclasses import dataclass, field

from fedllm.adapters.parts import returned_part
from fedllm.config.key import named_values, split_number
from fedllm.config.keys import PRESETS, AggregationConfig, PrivacyConfig
from fedllm.errors import ConfigError

COORDINATE_RULES = frozenset({"trimmed-mean", "coordinate-median"})  # they compare single coordinates
# Published values: FedOpt (arXiv 2003.00295) and DiLoCo (arXiv 2311.08105).
LEARNING_RATES = {"fedavg": 1.0, "fedavgm": 1.0, "nesterov": 0.7}
ADAPTIVE_LEARNING_RATE = 1e-3
_MOMENTUM = ("learning-rate", "momentum")
_ADAPTIVE = (*_MOMENTUM, "second-moment", "adaptivity")
CONSTANTS = {
    "fedavg": ("learning-rate",),
    "fedavgm": _MOMENTUM,
    "nesterov": _MOMENTUM,
    "fedadam": _ADAPTIVE,
    "fedyogi": _ADAPTIVE,
    "fedadagrad": (*_MOMENTUM, "adaptivity"),  # it adds squares up, so that none is forgotten
}
MAX_MALICIOUS = 0.2  # of a round's clients, where aggregation.robust names no share

# Of a run with differential privacy, or with secret sums, that names no rule of its own.
PRIVATE_PRESET, SECRET_PRESET = "ffa", "rolora"
AXES = ("aggregation.train", "aggregation.read-out", "aggregation.weighting")
# A person who names no rule has these, and only then privacy or secrecy may choose one.
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
            0 <= self.momentum <= 0.9999
            and 0 <= self.second_moment <= 0.9999
            and 0 < self.adaptivity < 1e9
            and 0 <= self.learning_rate < 1e9
        ):
            raise ConfigError(
                "aggregation.optimizer: expected momentum and second-moment from 0 to 0.9999, learning-rate"
                " and adaptivity above 0"
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

    `node_sum` says that a node answers with one sum for all of its clients.
    """

    train: str = "both"
    read_out: str = "svd"
    weighting: str = "examples"
    robust: str = "none"
    max_malicious: float = MAX_MALICIOUS
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    node_sum: bool = False

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


def server_optimizer(section: AggregationConfig) -> ServerOptimizer:
    """Return the optimizer that `aggregation.optimizer` names, such as "fedadam:second-moment=0.95".

    Raises:
        ConfigError: a constant is none of this optimizer's, no number or out of range.
    """
    name, _, text = section.optimizer.partition(":")
    known = CONSTANTS[name]
    try:
        named = named_values("aggregation.optimizer", text, known)
        constants = {constant.replace("-", "_"): float(value) for constant, value in named.items()}
        if not constants.get("learning_rate", 1.0):
            raise ValueError("nothing would be learnt")
        return ServerOptimizer(name=name, **constants)
    except (ConfigError, ValueError):
        raise ConfigError(
            f"aggregation.optimizer = {section.optimizer!r}: {name} takes numbers for {', '.join(known)},"
            f" as in {name}:{known[-1]}=0.5; momentum and second-moment go from 0 to 0.9999,"
            " learning-rate and adaptivity are above 0"
        ) from None


def aggregation_rule(
    given: AggregationConfig, privacy: PrivacyConfig, *, node_sum: bool, is_secret: bool = False
) -> AggregationRule:
    """Return the aggregation rule of a run, its preset resolved.

    Under privacy the rule of a recipe that names none is FFA-LoRA: with A fixed the noise on B enters the
    product once and linearly, while noise on both factors would be multiplied with one another. Where a
    server learns the sum alone (`is_secret`) it is RoLoRA: the mean of one factor, the other being common to
    all, is exact without any client's own product.

    Raises:
        ConfigError: the preset contradicts an axis, or nothing would be learnt.
    """
    preset, asked_weighting = given.preset, given.weighting
    names_none = (given.train, given.read_out, preset) == _DEFAULT_AXES
    if names_none and is_secret and privacy.epsilon == "off":
        preset = SECRET_PRESET
    elif names_none and privacy.epsilon != "off":
        preset = PRIVATE_PRESET
        # Rows as weights are bounded by a cap; under DP-SGD the noise is in the update, whatever its weight.
        is_capped = privacy.weight_cap != "off" or privacy.unit == "example"
        asked_weighting = asked_weighting if is_capped or asked_weighting != "examples" else "uniform"
    train, read_out, weighting = _preset_axes(preset, (given.train, given.read_out, asked_weighting))
    if train == "a":
        raise ConfigError(
            "aggregation.train = 'a' would learn nothing: a run starts from B = 0, where the gradient of A is"
            " 0 and stays so; set aggregation.train = 'alternate', which trains both in turn, or 'b'"
        )
    robust, max_malicious = split_number(given.robust, MAX_MALICIOUS)
    return AggregationRule(
        train=train,
        read_out=read_out,
        weighting=weighting,
        robust=robust,
        max_malicious=max_malicious,
        optimizer=server_optimizer(given),
        node_sum=node_sum,
    )


def _preset_axes(preset: str, given: tuple[str, str, str]) -> tuple[str, ...]:
    """Return (train, read-out, weighting) of a preset; as given where there is none or it leaves one open.

    Raises:
        ConfigError: an axis is neither its default nor the preset's.
    """
    if not preset:
        return given
    usual = AggregationConfig()
    defaults = (usual.train, usual.read_out, usual.weighting)
    for axis, value, wanted, default in zip(AXES, given, PRESETS[preset], defaults, strict=False):
        if wanted and value not in (wanted, default):
            raise ConfigError(
                f"{axis} = {value!r} contradicts aggregation.preset = {preset!r}, which is"
                f" {wanted!r}; leave one of them out"
            )
    return tuple(wanted or value for value, wanted in zip(given, PRESETS[preset], strict=False))
