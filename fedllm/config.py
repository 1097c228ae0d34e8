"""The one home of every default: a frozen tree whose leaves are the flat keys of a run.

`train.local-steps` names the same value in a TOML recipe, on the command line, in `flwr run --run-config`
and in `[tool.flwr.app.config]`. Flower admits only scalars, so every leaf is a bool, int, float or str.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from fedllm import rule
from fedllm.composition import check_combinations
from fedllm.errors import ConfigError
from fedllm.limits import check_limits

Scalar: TypeAlias = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which frozen base model, and how this machine holds it."""

    name: str = "smollm2-135m-instruct"  # alias, hub id, local folder or .gguf file
    revision: str = ""  # hub revision; empty = the default branch
    dtype: str = "auto"  # auto = float32 on CPU, bfloat16 on GPU
    device: str = "auto"  # auto = cuda where present, else cpu
    quantization: str = "none"  # none | 8bit | 4bit (bitsandbytes, GPU)
    gradient_checkpointing: bool = False
    num_threads: int = 0  # CPU threads of torch; 0 = torch's own choice


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter's numbers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 8
    alpha: float = 16.0
    target_modules: str = "all-linear"  # or a comma-separated list: "q_proj,v_proj"
    init_a: str = "auto"  # auto | kaiming | orthonormal (auto = kaiming, orthonormal under privacy)
    client_ranks: str = ""  # empty = lora.rank; "4,8,16" dealt in turn over sorted client ids; "anna:4,ben:8"
    dropout: float = 0.0  # share of the adapters' inputs dropped while training


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where private text is and how it becomes one shard per client."""

    source: str = "docstrings"  # docstrings | hub id | local path, glob or comma-separated paths
    split: str = "train"  # split of a hub data set
    partition: str = "column:client"  # column:NAME | iid | dirichlet:NAME:ALPHA | quantity:SKEW
    prompt_column: str = ""  # empty = detected by its usual names
    response_column: str = ""
    text_column: str = ""
    on_bad_row: str = "skip"  # skip | stop
    held_out_fraction: float = 0.1  # share of a client's rows kept for evaluation
    max_held_out: int = 64  # rows of that share at most
    max_rows: int = 0  # rows of a client at most, before the split; 0 = all


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who takes part, and when a round closes."""

    num_clients: int = 8
    num_rounds: int = 3
    cohort_size: int = 0  # clients of a round; 0 = cohort-fraction of all
    cohort_fraction: float = 1.0
    selection: str = "uniform"  # uniform | weighted | poisson | power-of-choice | oort
    candidates: int = 0  # clients power-of-choice draws first; 0 = twice the cohort
    preferred_seconds: float = 0.0  # of training, above which oort counts a client less; 0 = no matter
    over_selection: float = 1.0  # ask this many times the cohort and keep the first to answer
    max_staleness: int = 0  # rounds by which an update may come late and still count; 0 = none
    min_clients: int = 1  # fewer accepted updates leave the model unchanged
    round_deadline: float = 600.0  # seconds
    join_deadline: float = 120.0  # seconds to wait for nodes to appear and answer
    max_retries: int = 2  # attempts after a round's first
    max_failure_rate: float = 0.5  # of a round's clients; above it three rounds in a row stop the run


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One client's local training in one round."""

    local_steps: int = 4
    batch_size: int = 4
    learning_rate: float = 1e-3
    schedule: str = "constant"  # constant | cosine (over rounds)
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of a client's whole gradient; 0 = off
    proximal: float = 0.0  # strength mu of the pull back to where the round began; 0 = off
    proximal_space: str = "factor"  # factor | product
    control_variates: bool = False  # SCAFFOLD; experimental
    max_length: int = 256  # tokens of a row
    token_budget: int = 0  # tokens of one pass: clients are fused up to it; 0 = automatic, 1 = each alone


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """How client updates become one adapter: a point of the grid in fedllm/rule.py."""

    preset: str = ""  # a published method, in place of train, read-out and weighting; empty = as they are
    train: str = "both"  # both | a | b | alternate (b in odd rounds, a in even ones)
    read_out: str = "svd"  # svd | factor-mean | residual | stack | projection | local-b
    weighting: str = "examples"  # examples | tokens | uniform | product-norm
    robust: str = "none"  # what is left to each client; the choices are in strategies/aggregation/robust.py
    max_malicious: float = 0.2  # of a round's clients: multi-krum and trimmed-mean leave out as many
    optimizer: str = "fedavg"  # fedavg | fedavgm | nesterov | fedadam | fedyogi | fedadagrad
    server_learning_rate: float = 0.0  # 0 = the optimizer's own: 1, nesterov 0.7, adaptive ones 0.001
    server_momentum: float = 0.9  # of every optimizer but fedavg
    second_moment: float = 0.99  # of fedadam and fedyogi
    adaptivity: float = 1e-4  # tau of the adaptive optimizers: the size of an adapter value's change
    staleness_exponent: float = 0.5  # a late update weighs 1 / (1 + rounds late)^this


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy; `privacy.epsilon` alone turns it on (docs/privacy.md)."""

    epsilon: float = 0.0  # budget of the run; 0 = no differential privacy
    delta: float = 1e-5  # probability with which the bound may fail; well below 1 / number of units
    unit: str = "example"  # example | client
    trust: str = "auto"  # auto | central | local | distributed (auto: central for clients, else local)
    clip: float = 1.0  # of a client's update, or of one row's gradient
    adaptive_clip: bool = False  # follow the median norm of the clients' updates, from clip on
    noise_multiplier: float = 0.0  # deviation of the noise over the clip; 0 = the least that epsilon allows
    max_participations: int = 0  # rounds that a client takes part in at most; 0 = all
    weight_cap: float = 0.0  # rows from which a client counts fully; 0 = no weights by rows
    metrics: str = "auto"  # auto | withheld | held-out | all (auto = held-out for examples, else withheld)


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What a run plants for its own audit (docs/audit.md): texts of random tokens among clients' rows."""

    canaries: int = 0  # texts a client draws; each is put among its rows by its own fair coin
    canary_tokens: int = 16  # length of one
    canary_repeats: str = "1"  # how often one stands among the rows; "1,4,16" dealt in turn


@dataclass(frozen=True, kw_only=True)
class PersonalConfig:
    """An adapter of a client's own on top of the shared one; it never leaves the client."""

    mode: str = "none"  # none | dual | ditto
    rank: int = 4
    steps: int = 4  # optimizer steps of it after a client's round
    pull: float = 0.1  # ditto: strength of the pull back to the shared adapter


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The clients' adapters taught back into the aggregated one, at the server."""

    when: str = "never"  # never | last | every
    teacher: str = "posterior"  # posterior | uniform | logit-mean
    text: str = "synthetic"  # synthetic | public text as in data.source | both: "synthetic+SOURCE"
    num_texts: int = 64  # texts to distil on; a quarter as many more are held out
    max_tokens: int = 128  # of a text
    steps: int = 50  # optimizer steps of the student
    batch_size: int = 8  # texts of a step
    learning_rate: float = 5e-4
    top_k: int = 64  # tokens of a prediction whose probability is kept one by one
    temper: float = 1.0  # beta of the posterior: below 1 a client's own certainty counts less
    pull: float = 0.0  # strength mu of the pull back to the aggregate; 0 = off
    max_teachers: int = 8  # the heaviest clients of the round; memory grows with them
    originality: str = "auto"  # auto | on | off: screen synthetic texts (auto = without privacy.epsilon)
    licence: str = ""  # of synthetic text, in your words; stands in synthetic.json
    control: bool = False  # also fine-tune on the same texts, to compare with
    gate: str = "auto"  # auto | public | clients


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """How a delta travels."""

    codec: str = "bf16"  # fp32 | bf16 | int8
    node_sum: bool = False  # a node returns the weighted mean of its clients' deltas in place of each delta


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured besides the training loss."""

    every: int = 0  # held-out loss every so many rounds; 0 = before the first and after the last
    prompts: str = ""  # public prompts answered before and after, separated by " || "
    max_new_tokens: int = 24


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run itself: its folder and whether it continues an earlier one."""

    name: str = "run"
    output: str = ""  # folder that holds run folders; empty = ./runs
    resume: bool = False


def _section(factory: Callable[[], Any]) -> Any:
    return field(default_factory=factory)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Build it with `from_flat`; read any leaf as an attribute."""

    seed: int = 0
    run: RunSection = _section(RunSection)
    model: ModelConfig = _section(ModelConfig)
    lora: LoraConfig = _section(LoraConfig)
    data: DataConfig = _section(DataConfig)
    federation: FederationConfig = _section(FederationConfig)
    train: TrainConfig = _section(TrainConfig)
    aggregation: AggregationConfig = _section(AggregationConfig)
    privacy: PrivacyConfig = _section(PrivacyConfig)
    audit: AuditConfig = _section(AuditConfig)
    personal: PersonalConfig = _section(PersonalConfig)
    distill: DistillConfig = _section(DistillConfig)
    wire: WireConfig = _section(WireConfig)
    evaluation: EvaluationConfig = _section(EvaluationConfig)

    def __post_init__(self) -> None:
        check(self)

    def to_flat(self) -> dict[str, Scalar]:
        """Return every leaf under its flat kebab key, in declaration order."""
        return dict(_leaves(self))

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> "RunConfig":
        """Build a checked config from flat keys; keys left out keep their default.

        Raises:
            ConfigError: a key is unknown (the nearest known one is named) or a value is out of range.
        """
        defaults = dict(_leaves(cls()))
        sections: dict[str, dict[str, Scalar]] = {}
        top: dict[str, Any] = {}
        for key, value in flat.items():
            if key not in defaults:
                raise ConfigError(f"unknown key {key!r}{nearest(key, defaults)}")
            typed = coerce(key, value, defaults[key])
            section, _, leaf = key.partition(".")
            if leaf:
                sections.setdefault(section, {})[leaf.replace("-", "_")] = typed
            else:
                top[section] = typed
        for item in fields(cls):
            if item.name in sections:
                top[item.name] = dataclasses.replace(getattr(cls(), item.name), **sections[item.name])
        return cls(**top)

    def override(self, changes: Mapping[str, Scalar]) -> "RunConfig":
        """Return this config with the flat keys of `changes` replaced."""
        return type(self).from_flat({**self.to_flat(), **changes})


def _leaves(config: RunConfig) -> Iterable[tuple[str, Scalar]]:
    for item in fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            for leaf in fields(value):
                yield f"{item.name}.{leaf.name.replace('_', '-')}", getattr(value, leaf.name)
        else:
            yield item.name, value


def nearest(key: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known key closest to `key`, or ""."""
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if not close:  # people often write only the last part: "rank" for "lora.rank"
        close = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    return f"; did you mean {close[0]!r}?" if close else "; `fedllm check` lists every key"


def coerce(key: str, value: Any, like: Scalar) -> Scalar:
    """Return `value` as the type of `like`, accepting the text forms a command line or TOML gives.

    Raises:
        ConfigError: `value` does not denote a value of that type.
    """
    wanted = type(like)
    if wanted is bool and isinstance(value, str) and value.lower() in {"true", "false"}:
        return value.lower() == "true"
    if wanted is str and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)  # a TOML list, as people write target-modules
    if wanted is type(value):
        typed: Scalar = value
        return typed
    try:
        if wanted is float and not isinstance(value, bool):
            return float(value)
        if wanted is int and isinstance(value, str):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{key} = {value!r}: expected {_TYPE_NAMES[wanted]}")


_TYPE_NAMES: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check(config: RunConfig) -> None:
    """Refuse a config whose values are out of range or contradict each other.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    check_limits(config.to_flat())
    num_clients, cohort_size = config.federation.num_clients, cohort_size_of(config)
    if cohort_size > num_clients:
        raise ConfigError(
            f"federation.cohort-size = {cohort_size} is above federation.num-clients = {num_clients}"
        )
    if config.federation.min_clients > cohort_size:
        raise ConfigError(
            f"federation.min-clients = {config.federation.min_clients} is above the cohort of {cohort_size}"
        )
    check_combinations(config, rule.aggregation_rule(config), cohort_size, is_screened(config))
    if not config.run.name or "/" in config.run.name or config.run.name.startswith("."):
        raise ConfigError(f"run.name = {config.run.name!r}: expected a plain folder name")


def cohort_size_of(config: RunConfig) -> int:
    """Return how many clients a round trains: the fixed size, else the fraction of all, at least one."""
    federation = config.federation
    if federation.cohort_size:
        return federation.cohort_size
    return max(1, round(federation.cohort_fraction * federation.num_clients))


def is_screened(config: RunConfig) -> bool:
    """Return whether synthetic text passes gates of originality; what private adapters write needs none."""
    wanted = config.distill.originality
    return wanted == "on" or (wanted == "auto" and not config.privacy.epsilon)


def prompts_of(config: RunConfig) -> list[str]:
    """Return the public prompts of a run, answered before and after."""
    return [prompt.strip() for prompt in config.evaluation.prompts.split("||") if prompt.strip()]
