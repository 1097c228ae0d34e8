"""A federation of four tiny data holders in this process, one node each."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from clients.answering import make_client_app
from clients.data_holder import DataHolder
from clients.process import Process
from fedllm.config.run_config import RunConfig
from fedllm.engine.resident import Resident
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from scripts.runtimes.local import LocalGrid, local_grid
from strategies.exchange import joining
from strategies.grid import transport
from strategies.session import Session, Watch
from strategies.start import open_session
from tests.builders import Clock

NAMES = ("anna", "ben", "cleo", "dora")
WORDS = ("sum", "list", "file", "value", "error", "string", "number", "line", "index", "key", "name", "order")

RESIDENT = Resident()  # every run's clients and server use one base model

Tamper = Callable[[Message], list[Message]]


class WatchedGrid(LocalGrid):
    """A local grid whose replies pass through `tamper`, as a network or a hostile node would have it."""

    tamper: Tamper = staticmethod(lambda reply: [reply])

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [message for reply in super().pull_messages(message_ids) for message in self.tamper(reply)]


@dataclass
class Run:
    """A session over a watched grid, the state before round 1 and what the watcher heard."""

    session: Session
    state: ServerState
    grid: WatchedGrid
    notices: list[str]
    records: list[RoundRecord]
    process: Process

    def holder(self, node: int) -> DataHolder:
        """Return the data holder that a node has opened."""
        context = self.grid.contexts[node]
        return self.process.open(context.run_config, context.node_config)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let deadlines pass only where the server waits: no test depends on how fast this machine is."""
    clock = Clock()
    for module in (joining, transport):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write unequal numbers of rows for four clients."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for number, name in enumerate(NAMES):
        for row in range(5 + 2 * number):
            first, second = WORDS[(row + number) % 12], WORDS[(3 * row + number) % 12]
            answer = f"Return the {first} of a {second}."
            lines.append({"instruction": f"{name} {row}?", "output": answer, "client": name})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def make_config(
    rows_file: Path, make_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    """Return a function (**flat overrides) -> the configuration of the tiny federation."""
    runs = tmp_path_factory.mktemp("runs")  # clients may keep private state below it

    def make(overrides: dict[str, Any] | None = None) -> RunConfig:
        values = {
            "model.name": str(make_model_folder()),
            "model.device": "cpu",
            "run.output": str(runs),
            "data.source": str(rows_file),
            "lora.rank": 2,
            "lora.alpha": 4.0,
            "lora.target-modules": "q_proj,v_proj",
            "federation.num-clients": 4,
            "federation.join-deadline": 0.4,
            "federation.round-deadline": 60.0,
            "train.local-steps": 2,
            "train.batch-size": 2,
            "train.learning-rate": 0.05,
            "train.max-length": 48,
        }
        return RunConfig.from_flat({**values, **(overrides or {})})

    return make


@pytest.fixture
def open_run() -> Callable[..., Run]:
    """Return a function (config, absent, tamper, nodes, node configs, folder) -> a run that has begun."""

    def start(
        config: RunConfig,
        absent: Iterable[int] = (),
        tamper: Tamper | None = None,
        num_nodes: int = 4,
        node_configs: Mapping[int, Mapping[str, Any]] | None = None,
        folder: Path | None = None,
    ) -> Run:
        process = Process(RESIDENT)
        app = make_client_app(process)
        plain = local_grid(config, app, num_nodes=num_nodes)
        for node, extra in (node_configs or {}).items():
            plain.contexts[node].node_config.update(extra)
        contexts = {node: context for node, context in plain.contexts.items() if node not in set(absent)}
        grid = WatchedGrid(app, contexts)
        if tamper is not None:
            grid.tamper = tamper
        for context in contexts.values():  # a slow machine must not miss the short deadline for joining
            assert process.open(context.run_config, context.node_config).fingerprint
        notices: list[str] = []
        records: list[RoundRecord] = []
        watch = Watch(notice=notices.append, record=records.append)
        session = open_session(resolve(config), grid, watch, folder=folder, resident=RESIDENT)
        session.transport.poll_seconds = 0.01
        state = ServerState(0, session.initial)
        return Run(session, state, grid, notices, records, process)

    return start


@pytest.fixture
def watched_grid() -> type[WatchedGrid]:
    """Return the class of a local grid whose replies pass through its `tamper`."""
    return WatchedGrid


@pytest.fixture
def own_base_deltas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the base deltas of a test apart from those of others."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
