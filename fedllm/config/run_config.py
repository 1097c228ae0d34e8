"""The configuration of a run: every key by section, built from the flat names that people write."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fedllm.config.key import Allowed, Scalar, allowed_of, coerce, key, meaning_of
from fedllm.config.keys import (
    AggregationConfig,
    AuditConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    FederationConfig,
    LoraConfig,
    ModelConfig,
    PersonalConfig,
    PrivacyConfig,
    RunSection,
    TrainConfig,
    WireConfig,
)
from fedllm.errors import ConfigError


def _section(factory: Callable[[], Any]) -> Any:
    return field(default_factory=factory)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Build it with `from_flat`; read any leaf as an attribute."""

    seed: int = key(
        0, "every random draw of a run is a stream derived from it", at_least=0, at_most=2**63 - 1
    )
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
        for name, value, item in _leaves(self):
            fault = allowed_of(item).fault(value)
            if fault:
                raise ConfigError(f"{name} = {value!r}: {fault}")

    def to_flat(self) -> dict[str, Scalar]:
        """Return every leaf under its flat kebab key, in declaration order."""
        return {name: value for name, value, _ in _leaves(self)}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> "RunConfig":
        """Build a checked config from flat keys; keys left out keep their default.

        Raises:
            ConfigError: a key is unknown (the nearest known one is named) or a value is out of range.
        """
        defaults = cls().to_flat()
        sections: dict[str, dict[str, Scalar]] = {}
        top: dict[str, Any] = {}
        for name, value in flat.items():
            if name not in defaults:
                raise ConfigError(f"unknown key {name!r}{nearest(name, defaults)}")
            typed = coerce(name, value, defaults[name])
            section, _, leaf = name.partition(".")
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


def described_keys() -> list[tuple[str, Scalar, str, Allowed]]:
    """Return (flat name, default, meaning, what it may be) of every key, in declaration order."""
    return [(name, value, meaning_of(item), allowed_of(item)) for name, value, item in _leaves(RunConfig())]


def _leaves(config: RunConfig) -> Iterator[tuple[str, Scalar, "dataclasses.Field[Any]"]]:
    """Yield every leaf of a config: its flat name, its value and its field."""
    for item in fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            for leaf in fields(value):
                yield f"{item.name}.{leaf.name.replace('_', '-')}", getattr(value, leaf.name), leaf
        else:
            yield item.name, value, item


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known key closest to `name`, or ""."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:  # people often write only the last part: "rank" for "lora.rank"
        close = [each for each in names if each.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {close[0]!r}?" if close else "; `fedllm check` lists every key"
