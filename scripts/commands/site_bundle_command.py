"""`fedllm site bundle`: the code that a server with this release ships, as a site pins it."""

import hashlib
import tempfile
from pathlib import Path

from scripts.runtimes.processes import Link
from scripts.runtimes.submitting import app_folder


def bundle() -> None:
    """Print the SHA-256 of the bundle that this installation would ship."""
    from flwr.cli.build import build_fab_from_disk

    with tempfile.TemporaryDirectory() as folder:
        content = build_fab_from_disk(app_folder(Link(Path(folder), 0)))
    print(hashlib.sha256(content).hexdigest())
