"""Numbers that are measured on a machine once, and then kept in the user's cache."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedllm.files import cache_folder, write_file


def remembered(name: str, key: str, measure: Callable[[], int]) -> int:
    """Return the positive number kept under `key` in file `name`, else what `measure` returns: kept then."""
    file = cache_folder() / name
    if key in (known := _read(file)):
        return known[key]
    # Processes that start together measure together: all take the number that was kept first.
    known = {key: measure(), **_read(file)}
    with suppress(OSError):  # a cache that cannot be written only costs the next measurement
        write_file(file, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return known[key]


def _read(file: Path) -> dict[str, int]:
    """Return the numbers that are kept; anything else in the file counts as absent."""
    try:
        values = json.loads(file.read_text())
        return {key: value for key, value in values.items() if isinstance(value, int) and value > 0}
    except (OSError, ValueError, AttributeError):
        return {}
