"""Round records as JSON lines."""

import json
import math
from dataclasses import asdict
from typing import Any

from fedllm.types import DistilRecord, RoundRecord


def record_to_dict(record: RoundRecord) -> dict[str, Any]:
    """Return a JSON-ready form of a record; numbers that are not finite become null."""
    values = {name: _plain(value) for name, value in asdict(record).items()}
    return {"round": values.pop("round_num"), **values, "mean_held_out": _plain(record.mean_held_out)}


def record_from_dict(values: dict[str, Any]) -> RoundRecord:
    """Return the record that `record_to_dict` wrote."""
    fields = {name: value for name, value in values.items() if name not in {"round", "mean_held_out"}}
    for name in {"asked", "accepted", "silenced"} & fields.keys():
        fields[name] = tuple(fields[name])
    distil = fields.pop("distil", None)
    return RoundRecord(
        round_num=values["round"], distil=None if distil is None else DistilRecord(**distil), **fields
    )


def record_to_line(record: RoundRecord) -> str:
    """Return one line of `rounds.jsonl`."""
    return json.dumps(record_to_dict(record), separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
