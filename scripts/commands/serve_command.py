"""`fedllm serve`: the server of a federation, which survives kills until its run has ended."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import typer

from fedllm.errors import ConfigError
from fedllm.files import locked, make_private_folder
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import STARTER, open_run_folder
from scripts.console import Console, shown_path
from scripts.event_log import EventLog
from scripts.recipe_arguments import request_of
from scripts.reporting.page import reported
from scripts.run_view import RunView
from scripts.runtimes.serving import Place, supervise
from scripts.runtimes.submitting import with_absolute_paths
from scripts.runtimes.supervisor import GaveUpError
from scripts.stopped_run import complete_rounds, told_how_to_go_on

LOGS = ("text", "json")
GAVE_UP = 75  # EX_TEMPFAIL: starting again may help, which after 2 it does not
_DEADLINE, _PATIENCE = "federation.join-deadline", 86_400.0  # a new run waits a day, unless told otherwise


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
    if not place.server.certificate.exists():
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
        stack.enter_context(reported(folder, view.notice))
        try:
            supervise(config, place, view, most_restarts, patience)
        except GaveUpError as error:
            print(f"fedllm: {error}", file=sys.stderr)
            raise typer.Exit(GAVE_UP) from None
        view.notice(f"complete: {shown_path(folder)}/adapter")
