"""TOML recipes and `key=value` overrides: the two ways a person writes a configuration."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.files import read_toml


def read_recipe(path: Path) -> dict[str, Scalar]:
    """Return the flat keys of a TOML recipe; tables and dotted keys mean the same.

    Raises:
        ConfigError: the file is absent or not TOML in UTF-8.
    """
    try:
        return flatten(read_toml(path))
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Return nested tables as flat dotted keys."""
    flat: dict[str, Scalar] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_overrides(pairs: Iterable[str]) -> dict[str, Scalar]:
    """Return the flat keys of `key=value` words; values stay text until the config types them.

    Raises:
        ConfigError: a word has no "=".
    """
    flat: dict[str, Scalar] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair!r}: expected key=value, for example train.local-steps=8")
        flat[key.strip()] = value.strip()
    return flat


def build_config(recipe: Path | None, overrides: Iterable[str]) -> RunConfig:
    """Return the config of a recipe (or the defaults) with overrides on top; raises `ConfigError`."""
    return RunConfig.from_flat({**(read_recipe(recipe) if recipe else {}), **parse_overrides(overrides)})
