"""A supervised run: what dies is started again, and the run submitted again, until it leaves its result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.errors import RunFailedError
from fedllm.runs.records import RoundRecord
from scripts.runtimes import supervisor as module
from scripts.runtimes.processes import Link
from scripts.runtimes.supervisor import GaveUpError, Kept, Supervisor, started
from tests.builders import Clock


@dataclass(eq=False)
class Process:
    """A process that lives until a test ends it."""

    pid: int
    code: int | None = None

    def poll(self) -> int | None:
        return self.code


@dataclass
class Heard:
    """What a view hears."""

    notices: list[str] = field(default_factory=list)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def record(self, record: RoundRecord) -> None:
        """Hear nothing."""

    def replay(self, record: RoundRecord) -> None:
        """Hear nothing."""


class World:
    """A server whose processes, ServerApp and time a test decides on; `at` maps seconds to what happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, at: dict[float, Callable[[], Any]]):
        self.clock, self.at, self.view = Clock(), dict(at), Heard()
        self.submitted: list[bool] = []  # run.resume of each
        self.deadlines: list[float] = []  # federation.join-deadline of each
        self.stopped: list[str] = []
        self.has_app, self.folder, self.starts = False, folder, True
        self.living: dict[str, Process] = {}
        config = RunConfig.from_flat({"run.output": str(folder), "run.name": "run"})
        processes = [Kept(name, lambda name=name: self.open(name)) for name in ("SuperLink", "SuperExec")]
        (folder / "run").mkdir(exist_ok=True)
        self.clock.sleep = self.sleep  # type: ignore[method-assign]
        monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setattr(module, "family", lambda pids: {1, 2, 3} if self.has_app else {1, 2})
        monkeypatch.setattr(module, "submit", self.submit)
        monkeypatch.setattr(module, "status", lambda link, run_id: "finished:failed")
        monkeypatch.setattr(module, "stop_run", lambda link, run_id: self.stopped.append(run_id))
        self.processes = processes
        self.supervisor = Supervisor(
            config,
            Link(folder, 1),
            processes,
            self.view,
            most_restarts=3,
            until_first_round={"federation.join-deadline": 999.0},
        )

    @contextmanager
    def open(self, name: str) -> Iterator[Process]:
        self.living[name] = Process(1)
        yield self.living[name]

    def submit(self, link: Link, config: RunConfig, federation: object) -> str:
        self.submitted.append(config.run.resume)
        self.deadlines.append(config.federation.join_deadline)
        self.has_app = self.starts
        return str(len(self.submitted))

    def sleep(self, seconds: float) -> None:
        self.clock.now += seconds
        for time in [time for time in self.at if time <= self.clock.now]:
            self.at.pop(time)()

    def app_dies(self) -> None:
        self.has_app = False

    def completes(self) -> None:
        (self.folder / "run" / "result.json").write_text("{}")
        self.app_dies()

    def run(self) -> None:
        with started(self.processes):
            self.supervisor.run()


def test_a_dead_serverapp_is_resumed_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, {})
    world.at = {5: world.app_dies, 9: world.completes}
    world.run()
    assert world.submitted == [False, True]
    assert world.stopped == ["1"], "nodes do not begin with what nobody waits for"
    assert world.clock.now < 10
    assert any("the ServerApp died; starting again" in text for text in world.view.notices)


def test_a_dead_superlink_comes_back_under_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, {})
    world.at = {5: lambda: setattr(world.living["SuperLink"], "code", 137), 9: world.completes}
    world.run()
    assert world.submitted == [False]
    assert world.supervisor.num_restarts == 1
    assert any("the SuperLink was killed by SIGKILL" in text for text in world.view.notices)


def test_a_superexec_takes_its_serverapp_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, {})

    def kill() -> None:
        world.living["SuperExec"].code = 137
        world.app_dies()

    world.at = {5: kill, 9: world.completes}
    world.run()
    assert world.submitted == [False, True]
    assert world.supervisor.num_restarts == 1, "two ends of one cause"
    assert any(text.startswith("the SuperExec was killed by SIGKILL") for text in world.view.notices)


def test_a_run_that_never_starts_is_submitted_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, {})
    world.starts = False
    world.at = {100: world.completes}
    world.run()
    assert world.submitted[:2] == [False, True]
    assert any("finished:failed" in text for text in world.view.notices)


def test_a_run_that_dies_each_time_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, {})
    submit = world.submit

    def fail(*words: Any) -> str:
        submit(*words)
        raise RunFailedError("flwr run failed: no run id")

    monkeypatch.setattr(module, "submit", fail)
    with pytest.raises(GaveUpError, match=r"no run id; started again 3 times without a new round, 0 are"):
        world.run()
    assert len(world.submitted) == 4
    assert 3 <= world.clock.now < 5, "it waits 0, 1 and 2 seconds"


def test_an_earlier_result_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"status": "failed"}')
    world = World(monkeypatch, tmp_path, {})
    world.at = {3: world.completes}
    world.run()
    assert world.clock.now >= 3


def test_health_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world, found = World(monkeypatch, tmp_path, {}), []

    def look() -> None:
        found.append(world.supervisor.health())

    def kill() -> None:
        world.living["SuperLink"].code = 1
        look()

    world.at = {2: look, 3: kill, 5: world.completes}
    assert not world.supervisor.health()["healthy"]
    world.run()
    assert [health["healthy"] for health in found] == [True, False]
    assert found[1]["alive"] == {"SuperLink": False, "SuperExec": True, "ServerApp": True}


def test_a_run_with_rounds_is_patient_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, {})

    def finish_round() -> None:
        (tmp_path / "run" / "checkpoints" / "round-00001").mkdir(parents=True)

    world.at = {3: world.app_dies, 5: finish_round, 6: world.app_dies, 9: world.completes}
    world.run()
    assert world.deadlines == [999.0, 999.0, 120.0]
