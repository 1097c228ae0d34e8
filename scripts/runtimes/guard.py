"""Runs one command, and ends it and all it has started once its starter ends: `python guard.py COMMAND ...`.

The starter holds the other end of the standard input, which the system closes however the starter ends, by
SIGKILL too. What the command starts stays in the guard's session, also where its own parent ends before it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

_TRIES = 200  # of 0.05 s; a zombie that nobody buries would else be waited for without end
_KILLED = 128 + signal.SIGKILL


def main(command: list[str]) -> None:
    """Run `command`; end with its exit code, or at the end of standard input."""
    for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Handled and not ignored: the command would inherit that, and it is to end at these.
        signal.signal(sign, lambda *unused: None)
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=lambda: _end(running.wait()), daemon=True).start()
    while os.read(0, 1):  # nothing is ever written: it returns when the starter has closed its end
        pass
    _end(_KILLED)


def _end(code: int) -> None:
    """Kill all other processes of this session, and end with an exit code."""
    me, session = os.getpid(), os.getsid(0)
    for _ in range(_TRIES):
        others = [process for process in _processes() if process != me and _session(process) == session]
        if not others:
            break
        for process in others:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    os._exit(code if code >= 0 else 128 - code)


def _processes() -> list[int]:
    if os.path.isdir("/proc/self"):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    done = subprocess.run(["ps", "-A", "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(number) for number in done.stdout.split()]


def _session(process: int) -> int:
    with suppress(OSError):
        return os.getsid(process)
    return -1  # it has ended, or is another user's


if __name__ == "__main__":
    main(sys.argv[1:])
