"""A site on this machine for tests: its site.toml, a few rows for each node, and its processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from clients.messenger import connected
from fedllm.errors import SiteAwayError

ROOT = Path(__file__).parents[1]
_PATIENCE = 300.0  # s, of a slow machine


def write_rows(file: Path, name: str, number: int = 12) -> Path:
    """Write the rows of one data holder, no two alike, and return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    verbs = ("Return", "Open", "Sort", "Count")
    rows = [
        {"prompt": f"def {name}_{i}(x)", "response": f"{verbs[i % 4]} the value {name} {i}."}
        for i in range(number)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_site(
    folder: Path, superlink: str, nodes: Mapping[str, Mapping[str, Any]], **tables: Mapping[str, Any]
) -> Path:
    """Write a site.toml whose state, socket and data lie in `folder`; a node may name its own `data`.

    `tables` are merged into those of the file, such as allow={"bundles": [...]}.
    """
    written: dict[str, dict[str, Any]] = {"site": {"state-path": "state", "socket": "door/site.sock"}}
    for name, table in tables.items():
        written[name] = {**written.get(name, {}), **table}
    written["nodes"] = {}
    for name, node in nodes.items():
        own = {} if "data" in node else {"data": str(write_rows(folder / "data" / f"{name}.jsonl", name))}
        written["nodes"][name] = {"superlink": superlink, **own, **node}
    file = folder / "site.toml"
    file.write_text(tomli_w.dumps(written))
    return file


@contextmanager
def started_site(
    file: Path, python: str = sys.executable, packages: str = ""
) -> Iterator["subprocess.Popen[str]"]:
    """Run `fedllm site start` in a process of its own, as a person would; it is ended by SIGTERM.

    `packages` is where another `python` finds ours.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "FEDLLM_SITE": ""}
    environment["PYTHONPATH"] = packages or os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (
        (file.parent / "site.log").open("w") as log,
        subprocess.Popen(
            [python, "-m", "fedllm", "site", "start", "--config", str(file)],
            cwd=file.parent,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        ) as starter,
    ):
        try:
            yield starter
        finally:
            starter.send_signal(signal.SIGTERM)
            starter.wait(60)


def health_of(socket: Path) -> dict[str, Any]:
    """Return what the service at a socket says of itself, {} where none listens."""
    try:
        with connected(str(socket), 0.0) as service:
            told: dict[str, Any] = service.get("/v1/health").json()
    except (httpx.HTTPError, SiteAwayError):
        return {}
    return told


def wait_for(state: Callable[[], Any], what: str, patience: float = _PATIENCE) -> Any:
    """Return the first value of `state` that is true, within so many seconds."""
    ends = time.monotonic() + patience
    while time.monotonic() < ends:
        if value := state():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {patience:g} s in vain: {what}")


def children_of(process: int) -> dict[int, str]:
    """Return all that a process has started and is still there, with its command line."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    found: dict[int, str] = {}
    known = {process}
    while more := {int(pid) for pid, parent, *_ in rows if int(parent) in known} - known:
        known |= more
    for pid, _, *words in rows:
        if int(pid) in known - {process}:
            found[int(pid)] = " ".join(words)
    return found
