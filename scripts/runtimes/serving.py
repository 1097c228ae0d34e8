"""The server of a run: its processes, supervised and, where asked, monitored."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.runs.records import RoundRecord
from scripts.deploying.certificates import Credentials
from scripts.runtimes.monitor import Monitor, monitored
from scripts.runtimes.processes import Link, stop_unfinished
from scripts.runtimes.shown_rounds import View
from scripts.runtimes.submitting import check_completed
from scripts.runtimes.supervisor import Supervisor, server_processes, started


@dataclass(frozen=True)
class Place:
    """Where a server keeps its own things, and where it listens."""

    credentials: Path
    state: Path
    port: int
    monitor: int  # 0: no monitor

    @property
    def server(self) -> Credentials:
        """The files by which the server is known."""
        return Credentials(self.credentials.absolute())


class Heard:
    """A view and, where there is one, a monitor that hear of the same run."""

    def __init__(self, view: View, monitors: list[Monitor]):
        self._view, self._monitors = view, monitors

    def notice(self, text: str) -> None:
        """Pass on one line of news."""
        self._view.notice(text)

    def record(self, record: RoundRecord) -> None:
        """Pass on a round."""
        self._view.record(record)
        for monitor in self._monitors:
            monitor.record(record)

    def replay(self, record: RoundRecord) -> None:
        """Pass on a round of an earlier session."""
        self._view.replay(record)
        for monitor in self._monitors:
            monitor.record(record)


def supervise(
    config: RunConfig, place: Place, view: View, most_restarts: int, until_first_round: Mapping[str, Scalar]
) -> None:
    """Run the server's processes until the run has ended.

    Raises:
        RunFailedError: it has not completed; GaveUpError: nor will it.
    """
    link = Link(place.state.absolute(), place.port, place.server)
    processes = server_processes(link)
    monitors: list[Monitor] = []
    for home in link.folder.glob("home-*"):  # with each bundle that was ever run
        shutil.rmtree(home, ignore_errors=True)
    heard = Heard(view, monitors)
    supervisor = Supervisor(
        config,
        link,
        processes,
        heard,
        most_restarts=most_restarts,
        until_first_round=until_first_round,
    )
    with ExitStack() as stack:
        if place.monitor:
            monitors.append(Monitor(config.run.name, config.federation.num_rounds, supervisor.health))
            stack.enter_context(monitored(monitors[0], place.monitor))
        stack.enter_context(started(processes[:1]))
        stop_unfinished(link)
        stack.enter_context(started(processes[1:]))
        supervisor.run()
        check_completed(link, supervisor.run_id, supervisor.folder)
