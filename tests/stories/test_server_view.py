"""What a server can see of one client's update: all of it in a plain run, nothing of it under masks.

Each site writes down its own updates, where the server cannot look. They are then sought in everything that
a hardened deployment leaves at the server: the wire inside its TLS, the database, the logs, the run folder.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

from fedllm.runs.folder import read_rounds
from fedllm.site_policy import load_policy
from scripts.deploying.certificates import new_node_key
from scripts.recipe_arguments import config_of
from scripts.runtimes.processes import register
from scripts.runtimes.site import running_site
from scripts.runtimes.submitting import submit
from tests.leak_search import contents_of, unpacked
from tests.site_builder import write_site
from tests.stories.test_canaries import INJECTED, Federation, federation

NAMES = ("anna", "ben", "cleo")
WINDOW, MOST = 48, 60  # bytes of a piece of an update, and how many are sought; by chance none occurs


def start_site(running: Federation, name: str, overheard: Path) -> ExitStack:
    """Start a site that writes its updates into a folder."""
    folder, key, credentials = running.folder / name, running.folder / f"{name}.key", running.link.credentials
    assert credentials is not None
    folder.mkdir()
    register(running.link, new_node_key(key))
    node = {"model-path": str(running.model), "client-id": name, "private-key": str(key)}
    node |= {"root-certificates": str(credentials.authority)}
    policy = load_policy(write_site(folder, running.link.address, {name: node}))
    path = f"{INJECTED}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    site = ExitStack()
    with patch.dict(os.environ, {"PYTHONPATH": path, "FEDLLM_TEST_OVERHEARD": str(overheard)}):
        site.enter_context(running_site(policy))
    return site


def windows_of(folder: Path) -> list[bytes]:
    """Return pieces of every update that the sites have written down, none of one value alone."""
    found = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        pieces = [content[at : at + WINDOW] for at in range(0, len(content) - WINDOW, WINDOW)]
        pieces = [piece for piece in pieces if len(set(piece)) > WINDOW // 4]
        found += pieces[:: max(1, len(pieces) // 5)]
    return found[:MOST]


def places_of(running: Federation, windows: Sequence[bytes]) -> set[str]:
    """Return where at the server a piece is found: "wire", or the name of a file."""
    seen = [("wire", bytes(stream)) for stream in running.between.streams]
    for folder in (running.link.folder, running.folder / "runs"):
        seen += [(file.name, content) for file, content in contents_of(folder)]
    return {
        place
        for place, content in seen
        if any(window in layer for layer in unpacked(content) for window in windows)
    }


@pytest.mark.soak
@pytest.mark.parametrize("method", ["none", "masks"])
def test_updates_are_seen_plain_and_not_under_masks(
    method: str, tiny_run: list[str], make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    changes = ["federation.num-clients=3", "federation.min-clients=3", "federation.num-rounds=2"]
    changes += ["wire.codec=fp32", f"secure.method={method}", "distill.when=never", "data.source=docstrings"]
    changes += [f"run.output={tmp_path / 'runs'}", "run.name=seen"]
    with federation(tmp_path, make_model_folder(), is_debugged=True) as running, ExitStack() as sites:
        for name in NAMES:
            sites.enter_context(start_site(running, name, tmp_path / "overheard"))
        submit(running.link, config_of([*tiny_run, *changes]), {})
        run = tmp_path / "runs" / "seen"
        running.wait_for((run / "result.json").exists)
        result = json.loads((run / "result.json").read_text())
        assert result["status"] == "completed", result
        windows = windows_of(tmp_path / "overheard")
        found = places_of(running, windows)
    assert [record.accepted for record in read_rounds(run) if record.round_num] == [NAMES, NAMES]
    assert len(windows) > 20
    assert any(b"anna" in stream for stream in running.between.streams), "the wire is in the clear"
    if method == "none":
        assert "wire" in found
        assert any(place.startswith("superlink.db") for place in found), "the database, or its journal"
    else:
        assert list((tmp_path / "overheard").glob("*.words"))
        assert found == set()
