"""What the tests of data sources build: files of rows, some with a text that no error may repeat."""

import json
from pathlib import Path
from typing import Any

SECRET = "xyzzy-private"


def write(path: Path, content: bytes | str) -> str:
    """Write a file, with the folders above it, and return its path as a source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return str(path)


def line(**row: Any) -> str:
    """Return a row as a line of a .jsonl file."""
    return json.dumps(row) + "\n"
