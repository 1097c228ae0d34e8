"""Runs one command, and ends it and all it has started once its starter ends: `python guard.py COMMAND ...`.

The starter holds the other end of the standard input, which the system closes however the starter ends, by
SIGKILL too. A process group would not do: Flower and Ray give what they start sessions and groups of its own.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_TRIES = 200  # of 0.05 s: nothing outlives SIGKILL for long
_KILLED = 128 + signal.SIGKILL


def main(command: list[str]) -> None:
    """Run `command`; end with its exit code, or at the end of standard input."""
    # What loses its own parent becomes a child of this process.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Handled and not ignored: the command would inherit that, and it is to end at these.
        signal.signal(sign, lambda *unused: None)
    # Where somebody kills this process itself, the system kills the command.
    running = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        close_fds=False,  # a site's service is given the socket it listens on
        preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    threading.Thread(target=lambda: _end(running.wait()), daemon=True).start()
    while os.read(0, 1):  # nothing is ever written: it returns when the starter has closed its end
        pass
    _end(_KILLED)


def _end(code: int) -> None:
    """Kill all that this process has started, directly or not, and end with an exit code."""
    known = {os.getpid()}
    for _ in range(_TRIES):
        living = family(known)
        known |= living  # a process whose parent is killed no longer names it
        others = living - {os.getpid()}
        if not others:
            break
        for process in others:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    os._exit(code if code >= 0 else 128 - code)


def family(known: set[int]) -> set[int]:
    """Return those of some processes that live, and the living ones that they started, directly or not."""
    living, found = _processes(), set(known)
    while more := {process for process, parent in living.items() if parent in found} - found:
        found |= more
    return found & living.keys()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _processes() -> dict[int, int]:
    """Return the living processes of this machine with their parents."""
    if not Path("/proc/self/stat").exists():
        with subprocess.Popen(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True) as listing:
            lines = listing.communicate()[0].splitlines()
        pairs = [map(int, line.split()) for line in lines]
        return {process: parent for process, parent in pairs if process != listing.pid}
    found: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            # "7 (a name) S 1 ...": the name may hold anything
            state, parent = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(place.name)] = int(parent)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
