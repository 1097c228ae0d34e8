"""One run through Flower's own processes on this machine: a simulation, or a deployment in small.

The server of a deployment survives kills (`scripts.runtimes.supervisor`); a simulation, which is one program,
does not, and is resumed by hand.
"""

import time
from contextlib import ExitStack
from pathlib import Path

import tomli_w

from fedllm.config.run_config import RunConfig
from fedllm.runs.folder import RESULT, run_folder
from scripts.run_view import RunView
from scripts.runtimes.machine import simulation_size
from scripts.runtimes.own_sites import own_policy, own_sites
from scripts.runtimes.processes import Link, superlink, temporary_link
from scripts.runtimes.shown_rounds import ShownRounds, version_of
from scripts.runtimes.submitting import check_completed, status, submit, with_absolute_paths
from scripts.runtimes.supervisor import Supervisor, server_processes, started

_LONGEST_SILENCE_SECONDS = 60.0  # before Flower is asked whether a run still lives
_CLOSING_SECONDS = 1.0  # the same, where the run has left its result
_ENDED = "Finished task"  # what a SuperLink logs at the end of a run, however it ended


def run_with_flower(config: RunConfig, view: RunView, *, is_simulation: bool) -> None:
    """Run `config` as a Flower simulation, or with one SuperNode per client on loopback.

    Raises:
        RunFailedError: the run does not complete; the reason is the run's own.
    """
    config = with_absolute_paths(config)
    folder = run_folder(config)
    (folder / RESULT).unlink(missing_ok=True)  # an earlier attempt's
    with ExitStack() as stack:
        private = folder / "private"
        link = stack.enter_context(temporary_link(is_hardened=not is_simulation))
        site = link.folder / "site.toml"
        site.write_text(tomli_w.dumps(own_policy(private)))
        variables = {"FEDLLM_SITE": str(site)}
        if is_simulation:
            stack.enter_context(superlink(link, is_simulation=True, variables=variables))
            shown = ShownRounds(folder, view)
            run_id = submit(link, config, simulation_size(config))
            view.notice(f"Flower run {run_id} on {link.address}")
            check_completed(link, run_id, folder, follow(link, run_id, folder, shown))
            return
        processes = server_processes(link, variables)
        stack.enter_context(started(processes))
        stack.enter_context(own_sites(link, config, private, view.notice))
        supervisor = Supervisor(config, link, processes, view)
        supervisor.run()
        check_completed(link, supervisor.run_id, folder)


def follow(link: Link, run_id: str, folder: Path, rounds: ShownRounds) -> str:
    """Show the rounds of a simulation until Flower says that it has ended, and return the status.

    Asking Flower costs a second of CPU, which training would miss. So it is asked when its
    SuperLink logs that the run has ended, and after a minute without news, as of a run that was killed.
    """
    said, heard = (0, 0), time.monotonic()
    while True:
        if rounds.show():
            heard = time.monotonic()
        silence = _CLOSING_SECONDS if (folder / RESULT).exists() else _LONGEST_SILENCE_SECONDS
        if link.log.exists() and version_of(link.log) != said:
            said = version_of(link.log)
            silence = 0.0 if _ENDED in link.log.read_text(errors="replace") else silence
        if time.monotonic() > heard + silence:
            now = status(link, run_id)
            if now.startswith("finished"):
                return now
            if now == "unknown" and not link.is_open():
                return "lost: its SuperLink has ended"
            heard = time.monotonic()
        time.sleep(0.2)
