"""A digest of what a message holds, the same at both ends, whatever order its records arrive in."""

import hashlib
import json

from flwr.app import Array, RecordDict


def content_digest(content: RecordDict) -> str:
    """Return the SHA-256 (hex) of all records of a message: names, numbers, texts and the bytes of arrays."""
    values = {name: {key: _plain(value) for key, value in record.items()} for name, record in content.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _plain(value: object) -> object:
    """Return a record's value in a form that JSON writes in one way."""
    if isinstance(value, Array):
        return [value.dtype, list(value.shape), value.stype, hashlib.sha256(value.data).hexdigest()]
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {"bytes": value.hex()} if isinstance(value, bytes) else value
