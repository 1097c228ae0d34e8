"""`fedllm serve`: the server of a federation, which survives kills until its run has ended."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import typer

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.files import locked, make_private_folder
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import STARTER, open_run_folder, run_folder
from fedllm.runs.records import RoundRecord
from scripts.console import Console, shown_path
from scripts.deploying.certificates import Credentials
from scripts.event_log import EventLog
from scripts.recipe_arguments import request_of
from scripts.run_view import RunView
from scripts.runtimes.monitor import Monitor, monitored
from scripts.runtimes.processes import Link
from scripts.runtimes.shown_rounds import View
from scripts.runtimes.submitting import check_completed, with_absolute_paths
from scripts.runtimes.supervisor import (
    GaveUpError,
    Supervisor,
    server_processes,
    started,
)
from scripts.stopped_run import complete_rounds, told_how_to_go_on

LOGS = ("text", "json")
GAVE_UP = 75  # EX_TEMPFAIL: starting again may help, which after 2 it does not
_DEADLINE, _PATIENCE = "federation.join-deadline", 86_400.0  # a new run waits a day, unless told otherwise


@dataclass(frozen=True)
class Place:
    """Where a server keeps its own things, and where it listens."""

    credentials: Path
    state: Path
    port: int
    monitor: int  # 0: no monitor


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


def serve(words: Sequence[str], *, place: Place, out: Path | None, most_restarts: int, log: str) -> None:
    """Serve the run that `words` describe until it has ended.

    Raises:
        FedLLMError: it cannot be served, or failed by its own word.
        typer.Exit: it was given up.
    """
    if log not in LOGS:
        raise ConfigError(f"--log {log}: expected one of {', '.join(LOGS)}")
    request = request_of(words, ["run.resume=true", *([f"run.output={out}"] if out else [])])
    config = with_absolute_paths(request.config)
    resolve(config)  # what the keys alone refuse comes before a folder is made
    if not Credentials(place.credentials).certificate.exists():
        raise ConfigError(f"{place.credentials} holds no certificate: make one with fedllm keys server")
    with ExitStack() as stack:
        folder = stack.enter_context(open_run_folder(config, STARTER))
        make_private_folder(place.state)
        if not stack.enter_context(locked(place.state / ".lock")):
            raise ConfigError(f"{place.state}: another fedllm serve uses it; choose another --state")
        stack.enter_context(told_how_to_go_on(folder))
        view = EventLog(config.run.name) if log == "json" else RunView(Console(), resolve(config))
        if rounds := complete_rounds(folder, config):
            view.notice(f"{config.run.name}: complete after {rounds} rounds")
            return
        patience = {} if _DEADLINE in request.origins else {_DEADLINE: _PATIENCE}
        try:
            _supervise(config, place, view, most_restarts, patience)
        except GaveUpError as error:
            print(f"fedllm: {error}", file=sys.stderr)
            raise typer.Exit(GAVE_UP) from None
        view.notice(f"complete: {shown_path(folder)}/adapter")


def _supervise(
    config: RunConfig, place: Place, view: View, most_restarts: int, until_first_round: Mapping[str, Scalar]
) -> None:
    """Run the server's processes until the run has ended.

    Raises:
        RunFailedError: it has not completed; GaveUpError: nor will it.
    """
    link = Link(place.state.absolute(), place.port, Credentials(place.credentials.absolute()))
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
        stack.enter_context(started(processes))
        supervisor.run()
        check_completed(link, supervisor.run_id, run_folder(config))
