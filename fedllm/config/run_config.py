"""The configuration of a run: every key by section, built from the flat names that people write."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from operator import attrgetter
from typing import Any

from fedllm.config import keys
from fedllm.config.key import Key, Scalar, declared_key, key
from fedllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Build it with `from_flat`; read a key as an attribute: `config.train.local_steps`."""

    seed: int = key(
        0, "every random draw of a run is derived from it", at_least=0, at_most=2**63 - 1
    )  # as 64 bits hold
    run: keys.RunSection = keys.RunSection()
    model: keys.ModelConfig = keys.ModelConfig()
    lora: keys.LoraConfig = keys.LoraConfig()
    data: keys.DataConfig = keys.DataConfig()
    federation: keys.FederationConfig = keys.FederationConfig()
    train: keys.TrainConfig = keys.TrainConfig()
    aggregation: keys.AggregationConfig = keys.AggregationConfig()
    privacy: keys.PrivacyConfig = keys.PrivacyConfig()
    audit: keys.AuditConfig = keys.AuditConfig()
    personal: keys.PersonalConfig = keys.PersonalConfig()
    distill: keys.DistillConfig = keys.DistillConfig()
    secure: keys.SecureConfig = keys.SecureConfig()
    wire: keys.WireConfig = keys.WireConfig()
    evaluation: keys.EvaluationConfig = keys.EvaluationConfig()
    track: keys.TrackConfig = keys.TrackConfig()

    def __post_init__(self) -> None:
        for name, value in self.to_flat().items():
            KEYS[name].check(value)

    def to_flat(self) -> dict[str, Scalar]:
        """Return every value under its flat kebab key, in the order of declaration."""
        return {name: attrgetter(name.replace("-", "_"))(self) for name in KEYS}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> "RunConfig":
        """Build a checked config from flat keys; keys left out keep their default.

        Raises:
            ConfigError: a key is unknown (the nearest known one is named) or a value is out of range.
        """
        sections: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            if name not in KEYS:
                raise ConfigError(f"unknown key {name!r}{nearest(name)}")
            section, _, leaf = name.replace("-", "_").rpartition(".")
            sections.setdefault(section, {})[leaf] = KEYS[name].typed(value)
        values = sections.pop("", {})  # the seed, which is in no section
        defaults = cls()
        built = {name: replace(getattr(defaults, name), **part) for name, part in sections.items()}
        return cls(**values, **built)

    def override(self, changes: Mapping[str, Scalar]) -> "RunConfig":
        """Return this config with the flat keys of `changes` replaced."""
        return type(self).from_flat({**self.to_flat(), **changes})


def _declared_keys() -> dict[str, Key]:
    declared = {}
    for item in fields(RunConfig):
        for leaf in fields(item.type) if is_dataclass(item.type) else (item,):
            name = leaf.name if leaf is item else f"{item.name}.{leaf.name}".replace("_", "-")
            declared[name] = declared_key(name, leaf)
    return declared


KEYS = _declared_keys()  # in the order of declaration
RESUMABLE_KEYS = frozenset(name for name, each in KEYS.items() if each.is_resumable)


def nearest(name: str) -> str:
    """Return "; did you mean 'x'?" for the known key closest to `name`, or where keys are listed."""
    section, dot, leaf = name.rpartition(".")
    # A slip of the pen, or only the last part: "rank" for "lora.rank".
    close = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.85)
    close = close or [each for each in KEYS if not section and each.rpartition(".")[2] == leaf][:1]
    # Else the key that speaks of it: "personal.pull" is a number in `personal.mode = "ditto:pull=0.2"`.
    words = [word for word in re.split("[-_]", leaf.lower()) if len(word) > 2]
    told = {each: f"{each} {KEYS[each].meaning} {KEYS[each].words}".lower() for each in KEYS}
    hits = {each: sum(word in text for word in words) for each, text in told.items()}
    within = [each for each in KEYS if each.startswith(section + dot)] or list(KEYS)
    close = close or [each for each in [max(within, key=hits.__getitem__)] if hits[each]]
    close = close or difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; `fedllm config` lists every key"
