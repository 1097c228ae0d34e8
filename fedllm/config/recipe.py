"""Recipes in TOML or YAML, and `key=value` overrides: the two ways a person writes a configuration."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.files import read_toml

YAML_SUFFIXES = (".yaml", ".yml")
SUFFIXES = (".toml", *YAML_SUFFIXES)


def read_recipe(path: Path) -> dict[str, Scalar]:
    """Return the flat keys of a recipe; tables and dotted keys mean the same.

    Raises:
        ConfigError: the file is absent, or not TOML (of a .yaml or .yml file: YAML) in UTF-8.
    """
    try:
        return flatten(read_yaml(path) if path.suffix in YAML_SUFFIXES else read_toml(path))
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mappings, lists and texts of a YAML file.

    Every other value stays the text that was written, which the key types: YAML's own rules would read the
    word `off` as false and `2e-3` as a text.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is not YAML in UTF-8, holds no mapping, or names a key twice.
    """
    try:
        node = yaml.compose(path.read_bytes().decode("utf-8-sig"), yaml.SafeLoader)
        values = {} if node is None else _values(node)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a YAML file in UTF-8; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}: not a YAML file ({error.problem}{line})") from None
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"{path}: not a YAML file, or one that refers to itself") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys with values, as `seed: 1`")
    return values


def _values(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        pairs = [(_values(name), _values(value)) for name, value in node.value]
        values = {str(name): value for name, value in pairs}
        if len(values) < len(pairs):  # refused as in TOML: neither value is to win in silence
            raise yaml.MarkedYAMLError(problem="a key is there twice", problem_mark=node.start_mark)
        return values
    if isinstance(node, yaml.SequenceNode):
        return list(map(_values, node.value))
    return None if node.tag.endswith(":null") else node.value


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
