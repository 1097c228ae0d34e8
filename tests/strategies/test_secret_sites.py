"""A whole run over sites that require secret sums, each with its own site.toml, key and peers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Context, Message

from clients import protect
from clients.answering import answer
from clients.gate import Sender
from clients.kinds import make_app
from clients.process import Process
from fedllm import chained_log
from fedllm.adapters.parts import part_of
from fedllm.config.run_config import RunConfig
from fedllm.errors import RunFailedError
from fedllm.identity import new_key, public_text
from fedllm.messages import ClientUpdate
from scripts.runtimes.local import LocalGrid, local_grid
from strategies.run import run_federation
from tests.strategies.conftest import NAMES, RESIDENT

BUNDLE = "ab" * 32
MASKS = {"secure.method": "masks", "federation.num-rounds": 2, "evaluation.prompts": ""}


class Recorded(LocalGrid):
    """A local grid that keeps every reply as the server gets it."""

    def pull_messages(self, message_ids: Any) -> list[Message]:
        replies = super().pull_messages(message_ids)
        self.sent += [message.content for message in replies if message.has_content()]
        return replies


@pytest.fixture
def sites(tmp_path: Path) -> dict[int, Path]:
    """Write a site.toml for each of four nodes: nothing but secret sums, and the other sites as peers."""
    folders = {node: tmp_path / "sites" / str(node) for node in range(2, 2 + len(NAMES))}
    keys = {node: public_text(new_key(folder / "site.key")) for node, folder in folders.items()}
    for node, folder in folders.items():
        peers = {f"site-{other}": key for other, key in keys.items() if other != node}
        allow = {"secure-aggregation": "required", "bundles": [BUNDLE], "server-paths": True}
        site = {"key": "site.key", "state-path": "state"}
        (folder / "site.toml").write_text(tomli_w.dumps({"site": site, "allow": allow, "peers": peers}))
    return {node: folder / "site.toml" for node, folder in folders.items()}


def grid_of(config: RunConfig, sites: Mapping[int, Path], monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Return a grid of nodes that answer each under its own site's file, as a site's service does."""
    processes = {node: Process(RESIDENT) for node in sites}

    def answer_at_site(message: Message, context: Context) -> Message:
        monkeypatch.setenv("FEDLLM_SITE", str(sites[context.node_id]))
        sender = Sender(server="fl:1", node=str(context.node_id), bundle=BUNDLE)
        return answer(processes[context.node_id], message, context, sender)

    app = make_app(answer_at_site)
    plain = local_grid(config, app, num_nodes=len(sites))
    for node, context in plain.contexts.items():
        context.node_config["state-path"] = str(sites[node].parent / "state")
    grid = Recorded(app, plain.contexts)
    grid.sent = []
    return grid


def test_sites_that_require_secret_sums_give_nothing_else(
    sites: dict[int, Path],
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that the server gets holds no update; a plain run, which the sites refuse, would show them."""
    deltas: list[np.ndarray] = []
    honest = protect.protect

    def watched(result: Any, *rest: Any, **options: Any) -> ClientUpdate:
        update = honest(result, *rest, **options)
        layout = rest[-1].layout
        deltas.extend(part_of(layout, update.delta, part).numpy() for part in "ab")
        return update

    monkeypatch.setattr(protect, "protect", watched)

    def found(grid: Recorded) -> int:
        """Count the updates of which eight values in a row stand somewhere in what the server got."""
        data = b"".join(
            array.data
            for sent in grid.sent
            for record in sent.array_records.values()
            for array in record.values()
        )
        pieces = [delta[at : at + 8] for delta in deltas for at in (np.flatnonzero(delta)[:1])]
        return sum(piece.tobytes() in data for piece in pieces)

    config = make_config({**MASKS, "run.name": "secret", "run.output": str(tmp_path), "wire.codec": "fp32"})
    grid = grid_of(config, sites, monkeypatch)
    state = run_federation(config, grid)
    assert [record.accepted for record in state.records] == [(), NAMES, NAMES]
    assert len(deltas) == 16
    assert found(grid) == 0
    for file in sites.values():
        asked = [entry["question"] for entry in chained_log.read_entries(file.parent / "state" / "log.jsonl")]
        assert asked.count("unmask") == 3  # in each round, and at the end of the run
        assert not list((file.parent / "state" / "secure").rglob("key"))
    plain = config.override({"secure.method": "none", "run.name": "plain", "aggregation.preset": "rolora"})
    with pytest.raises(RunFailedError, match="policy"):
        run_federation(plain, grid_of(plain, sites, monkeypatch))
    for file in sites.values():  # the control: the same sites without a policy
        file.write_text("[allow]\nserver-paths = true\n")
    deltas.clear()
    grid = grid_of(plain, sites, monkeypatch)
    run_federation(plain, grid)
    assert found(grid) == 8
