"""Which rows a run may learn from by their licence: an SPDX expression in a column `licence` or `license`."""

import re
from collections.abc import Mapping, Set
from functools import lru_cache
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from fedllm.errors import ConfigError

COLUMNS = ("licence", "license")
_YES, _NO = "yes", "no"  # in place of a bracket that was decided; no licence has such a name


def parse_licences(text: str) -> frozenset[str]:
    """Return the licences that `data.licences` = `text` allows, as SPDX writes them; none of "": any.

    Raises:
        ConfigError: one of them is not on SPDX's list, or is an expression of several.
    """
    allowed = set()
    for name in filter(None, map(str.strip, text.split(","))):
        try:
            known = str(canonicalize_license_expression(name))
        except InvalidLicenseExpression:
            known = ""
        if not known or {"AND", "OR"} & set(known.split()) or "(" in known:
            raise ConfigError(
                f"data.licences = {text!r}: {name!r} is no single SPDX identifier, such as MIT or CC-BY-4.0"
            )
        allowed.add(known)
    return frozenset(allowed)


def is_licensed(row: Mapping[str, Any], allowed: frozenset[str]) -> bool:
    """Return whether a row may be used: its licence is allowed, or nothing limits licences.

    A row that names none, or one that is not SPDX's, may not: nobody knows its terms. Where both columns name
    one, both must be allowed.
    """
    if not allowed:
        return True
    named = [value for name, value in row.items() if name.lower() in COLUMNS and value]
    return bool(named) and all(isinstance(value, str) and permits(value, allowed) for value in named)


@lru_cache(maxsize=1024)  # a data set has few licences and many rows
def permits(expression: str, allowed: frozenset[str]) -> bool:
    """Return whether an SPDX expression can be met by allowed licences alone: all of AND, one of OR."""
    try:
        text = str(canonicalize_license_expression(expression))
    except InvalidLicenseExpression:
        return False
    known = allowed | {_YES}
    while "(" in text:  # from the innermost bracket on
        text = re.sub(r"\(([^()]*)\)", lambda part: _YES if _is_met(part[1], known) else _NO, text)
    return _is_met(text, known)


def _is_met(flat: str, known: Set[str]) -> bool:
    # AND binds closer than OR, and WITH belongs to its licence.
    return any(all(one.strip() in known for one in way.split(" AND ")) for way in flat.split(" OR "))
