"""One key of a run: its default, its meaning and the values it takes, stated where the key is declared.

A value is a flag, a number, a text or one of a few words. A word may stand for a number ("auto", "all",
"off"), or be followed by one: "oort[:SECONDS]" allows `oort` and `oort:30`, "product:MU" only `product:0.1`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import Any, TypeAlias, TypeVar, get_args

from fedllm.errors import ConfigError

Scalar: TypeAlias = bool | int | float | str  # all that Flower admits as a value
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key as declared: its `types` in the order they are tried, its words (none: any text).

    `words` says of each word which number follows it: {"uniform": "", "oort": "[:SECONDS]"}.
    """

    name: str
    default: Scalar
    types: tuple[type, ...]
    meaning: str
    words: Mapping[str, str]
    low: float
    high: float
    is_open: bool  # `low` itself is refused
    is_resumable: bool  # a resumed run may change it
    separator: str = ","  # of a list, which the value holds as one text
    is_list: bool = False  # takes any number of its words

    @property
    def allowed(self) -> str:
        """The values it takes, as a phrase."""
        parts = ["true or false"] if bool in self.types else []
        if int in self.types or float in self.types:
            parts.append(f"{'a number' if float in self.types else 'a whole number'} {self._range}")
        if str in self.types:
            forms = ", ".join(word + ending for word, ending in self.words.items())
            numbers = re.findall(r":([A-Z]+)\b(?!=)", forms)
            if numbers and not parts:  # after a colon, which no range has been named for
                forms += f"; {' and '.join(dict.fromkeys(numbers))} {self._range}"
            choice = f"any of {forms}, parted by commas" if self.is_list else f"one of {forms}"
            parts.append(choice if len(self.words) > 1 else forms or "text")
        return ", or ".join(parts)

    @property
    def _range(self) -> str:
        most = "" if math.isinf(self.high) else f" up to {self.high:,}"
        return f"{'above' if self.is_open else 'from'} {self.low:,}{most}"

    def typed(self, value: Any) -> Scalar:
        """Return `value` as a type of the key; command lines give text, TOML also lists.

        Raises:
            ConfigError: `value` does not denote a value of these types.
        """
        for kind in self.types:
            found: Scalar | None = _as(kind, value, self.separator)
            if found is not None:
                return found
        raise ConfigError(f"{self.name} = {value!r}: expected {self.allowed}")

    def check(self, value: Scalar) -> None:
        """Refuse a value that the key does not take; raises `ConfigError`."""
        takes = self._takes_text(value) if isinstance(value, str) else self._takes_number(value)
        if not takes and value != self.default:  # "" may stand for "none of the words"
            raise ConfigError(f"{self.name} = {value!r}: expected {self.allowed}")

    def _takes_text(self, value: str) -> bool:
        if self.is_list:
            return all(part.strip() in self.words for part in value.split(self.separator))
        word, colon, after = value.partition(":")
        ending = self.words.get(word)
        if not self.words or ending is None:
            return not self.words  # any text, such as a path
        if not colon:
            return not ending.startswith(":")  # as in "product:MU", which means nothing alone
        if "=" in ending:  # named numbers, checked where their names are known
            return "=" in after
        return bool(ending) and self._takes_number(_as(float, after))

    def _takes_number(self, value: float | None) -> bool:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return False  # even where nothing bounds it from above
        return self.low <= value <= self.high and not (self.is_open and value == self.low)


def key(
    default: Scalar,
    meaning: str,
    *,
    words: str = "",
    at_least: float = -math.inf,
    above: float | None = None,
    at_most: float = math.inf,
    resumable: bool = False,
    separator: str = ",",
    is_list: bool = False,
) -> Any:
    """Return the dataclass field of a key; its checks and docs/config.md come from it.

    `rank: int = key(8, "rank R of the factors", at_least=1, at_most=4096)`
    """
    low, is_open = (at_least, False) if above is None else (above, True)
    forms = dict(re.findall(r"([^\s\[:]+)(\S*)", words))  # "none oort[:SECONDS]" -> none and oort
    metadata = {"meaning": meaning, "words": forms, "low": low, "high": at_most, "separator": separator}
    more = {"is_open": is_open, "is_resumable": resumable, "is_list": is_list}
    return field(default=default, metadata=metadata | more)


def declared_key(name: str, item: "Field[Any]") -> Key:
    """Return the key that a dataclass field declares."""
    default: Any = item.default
    return Key(name=name, default=default, types=get_args(item.type) or (item.type,), **item.metadata)


def _as(kind: type, value: Any, separator: str = ",") -> Any:
    """Return `value` as a value of one type, None where it is none."""
    if type(value) is kind:  # not isinstance: True is no number
        return value
    if kind is bool:
        return {"true": True, "false": False}.get(str(value).lower())
    if kind is str:  # people write target-modules as a list, and a run's name as 2026
        parts = value if isinstance(value, list) else [value]
        is_text = all(type(part) in (str, int) for part in parts)
        return separator.join(map(str, parts)) if is_text else None
    is_number = isinstance(value, str) or (kind is float and type(value) is int)
    try:
        return kind(value) if is_number else None
    except (ValueError, OverflowError):
        return None


def number_or(value: _Number | str, default: _Number) -> _Number:
    """Return the number, or `default` in place of a word such as "auto"."""
    return default if isinstance(value, str) else value


def split_number(value: float | str, default: float) -> tuple[str, float]:
    """Return ("oort", 30.0) of "oort:30"; a word alone has the number `default`, a number alone no word."""
    if not isinstance(value, str):
        return "", value
    word, colon, number = value.partition(":")
    return word, float(number) if colon else default


def named_values(name: str, text: str, known: Sequence[str]) -> dict[str, str]:
    """Return {"prompt": "q", "response": "a"} of "prompt=q,response=a", the text of the key `name`.

    Only a known name begins a value, so values may hold commas.

    Raises:
        ConfigError: the text begins with another name, or has one twice.
    """
    before, *parts = re.split(rf"(?:^|,)\s*({'|'.join(known)})=", text)
    if before.strip() or len(set(parts[::2])) < len(parts[::2]):
        raise ConfigError(f"{name} = {text!r}: expected {','.join(f'{each}=VALUE' for each in known)}")
    return dict(zip(parts[::2], parts[1::2], strict=True))
