"""The JSON schema of a recipe, by which an editor completes and checks keys in TOML and YAML."""

import math
import re
from typing import Any

from fedllm.config.key import Key
from fedllm.config.run_config import KEYS


def recipe_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12): every key as `lora.rank`, and as `rank` in the table `lora`."""
    tables: dict[str, Any] = {}
    for key in KEYS.values():
        section, _, leaf = key.name.rpartition(".")
        if section:
            table = tables.setdefault(section, {"type": "object", "properties": {}})
            table["properties"][leaf] = {"$ref": f"#/$defs/{key.name}"}
            table["additionalProperties"] = False
    flat = {name: {"$ref": f"#/$defs/{name}"} for name in KEYS}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of fedllm",
        "type": "object",
        "properties": {**tables, **flat},
        "additionalProperties": False,
        "$defs": {name: key_schema(key) for name, key in KEYS.items()},
    }


def key_schema(key: Key) -> dict[str, Any]:
    """Return the schema of one key's values."""
    forms = [_number(key, kind) for kind in key.types if kind in (int, float)]
    forms += [{"type": "boolean"}] if bool in key.types else []
    if key.is_list:
        word = f"({'|'.join(map(re.escape, key.words))})"
        several = {"type": ["string", "array"], "items": {"enum": list(key.words)}}
        forms.append({**several, "pattern": f"^({word}(,{word})*)?$"})
    elif str in key.types and not key.words:
        forms.append({"type": ["string", "array"]})  # people write a list for "q_proj,v_proj"
    elif str in key.types:
        # A word with a number after it is a pattern; editors offer the plain ones.
        plain = [word for word, ending in key.words.items() if not ending or ending.startswith("[")]
        numbered = "|".join(re.escape(word) for word, ending in key.words.items() if ending)
        forms.append({"enum": sorted({*plain, str(key.default)} if key.types == (str,) else plain)})
        forms += [{"type": "string", "pattern": f"^({numbered}):.+$"}] if numbered else []
    form = forms[0] if len(forms) == 1 else {"anyOf": forms}
    return {"description": f"{key.meaning}. Takes {key.allowed}.", "default": key.default, **form}


def _number(key: Key, kind: type) -> dict[str, Any]:
    least = {} if math.isinf(key.low) else {"exclusiveMinimum" if key.is_open else "minimum": key.low}
    most = {} if math.isinf(key.high) else {"maximum": key.high}
    return {"type": "integer" if kind is int else "number", **least, **most}
