"""One key of a run: its default, its meaning and what it may be, stated where the key is declared."""

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, field
from typing import Any, TypeAlias

from fedllm.errors import ConfigError

Scalar: TypeAlias = bool | int | float | str  # all that Flower admits as a value


@dataclass(frozen=True)
class Allowed:
    """What a value may be: one of `choices` where there are any, else a number between two bounds.

    With `is_open` the lower bound itself is refused. A bound that is infinite bounds nothing, but infinity is
    never a value.
    """

    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False

    def fault(self, value: Scalar) -> str:
        """Return what is wrong with a value, as "expected ...", or ""."""
        if self.choices:
            named = ", ".join(choice for choice in self.choices if choice)
            return "" if value in self.choices else f"expected one of {named}"
        if isinstance(value, str | bool):
            return ""
        is_infinite = isinstance(value, float) and not math.isfinite(value)
        if not is_infinite and self.low <= value <= self.high and not (self.is_open and value == self.low):
            return ""
        bounds = f"{'above' if self.is_open else 'at least'} {self.low:g}"
        bounds += "" if math.isinf(self.high) else f" and at most {self.high:g}"
        return f"expected a value {'finite and ' if is_infinite else ''}{bounds}"


def key(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float = math.inf,
) -> Any:
    """Return the dataclass field of a key; docs/config.md and the check of its values come from it.

    `rank: int = key(8, "LoRA rank R", at_least=1, at_most=4096)`
    """
    low = above if above is not None else -math.inf if at_least is None else at_least
    allowed = Allowed(tuple(choices), low, at_most, above is not None)
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


def allowed_of(item: "Field[Any]") -> Allowed:
    """Return what the key of a field may be."""
    allowed: Allowed = item.metadata["allowed"]
    return allowed


def meaning_of(item: "Field[Any]") -> str:
    """Return what the key of a field means, for docs/config.md."""
    meaning: str = item.metadata["meaning"]
    return meaning


def coerce(name: str, value: Any, like: Scalar) -> Scalar:
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
    raise ConfigError(f"{name} = {value!r}: expected {_TYPE_NAMES[wanted]}")


_TYPE_NAMES: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
