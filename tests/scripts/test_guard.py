"""What a guarded command has started ends with it, and with whoever started it."""

import os
import signal
import subprocess
import sys

import pytest

from scripts.runtimes import guard

# A grandchild in a session of its own, as those of Flower are; all three hold the same standard output.
COMMAND = """
import subprocess, sys, time
lives = "import os, time; os.setsid(); print('ready', flush=True); time.sleep(60); print('lived on')"
child = subprocess.Popen([sys.executable, "-c", lives])
{then}
"""
STARTER = """
import subprocess, sys
command = [sys.executable, {guard!r}, sys.executable, "-c", {command!r}]
started = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
print("ended with", started.wait(), flush=True)
"""


def start(then: str) -> "subprocess.Popen[str]":
    script = STARTER.format(guard=guard.__file__, command=COMMAND.format(then=then))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_sigkill_of_the_starter_ends_all_that_it_started() -> None:
    with start("child.wait()") as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"
        starter.send_signal(signal.SIGKILL)
        assert starter.stdout.read() == ""  # returns once nobody holds the output any more


def test_the_end_of_the_command_is_the_end_of_its_children() -> None:
    with start("sys.exit(7 * (sys.stdin.read() == ''))") as starter:
        assert starter.stdout is not None
        lines = starter.stdout.read().splitlines()
    assert lines[-1] == "ended with 7"
    assert "lived on" not in lines


def test_a_guarded_command_ends_at_sigterm() -> None:
    command = [sys.executable, guard.__file__, sys.executable, "-c", COMMAND.format(then="child.wait()")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        os.killpg(running.pid, signal.SIGTERM)
        assert running.wait() == 128 + signal.SIGTERM
        assert running.stdout.read() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a guard that is killed itself guards nothing")
def test_the_kill_of_a_guard_ends_its_command() -> None:
    command = [
        sys.executable,
        guard.__file__,
        sys.executable,
        "-c",
        "import time; print('ready', flush=True); time.sleep(60)",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.kill()
        assert running.stdout.read() == ""
