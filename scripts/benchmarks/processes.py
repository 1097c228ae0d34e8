"""What a command costs together with every process it starts: CPU seconds and memory, sampled as it runs.

`resource.RUSAGE_CHILDREN` counts only children that were waited for, and Flower and Ray end most of theirs
otherwise; so the tree is walked twice a second and what a process last showed is kept when it is gone.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

SAMPLE_SECONDS = 0.5
LOOK_SECONDS = 0.02  # between two looks at the file


@dataclass(frozen=True)
class Sample:
    """What all processes have cost by now: CPU seconds by kind, resident bytes (shared pages count twice)."""

    time: float  # seconds since the epoch
    cpu: Mapping[str, float]
    rss: int


@dataclass(frozen=True)
class Change:
    """A watched file after it was written: when, in seconds since the epoch, and its number of lines."""

    time: float
    num_lines: int


@dataclass(frozen=True)
class Watched:
    """A command that ended well, with what was seen on the way."""

    started: float  # seconds since the epoch
    ended: float
    samples: tuple[Sample, ...]
    changes: tuple[Change, ...]

    def cpu_at(self, moment: float) -> dict[str, float]:
        """Return the CPU seconds until `moment` by kind of process, between samples on a straight line."""
        times = [sample.time for sample in self.samples]
        kinds = sorted({kind for sample in self.samples for kind in sample.cpu})
        return {
            kind: float(np.interp(moment, times, [sample.cpu.get(kind, 0.0) for sample in self.samples]))
            for kind in kinds
        }


class ProcessTree:
    """A process and all it has started; `kind_of` (name, command line) sorts them."""

    def __init__(self, pid: int, kind_of: Callable[[str, str], str]):
        self._root = psutil.Process(pid)
        self._kind_of = kind_of
        self._living: set[psutil.Process] = {self._root}
        self._cpu: dict[psutil.Process, tuple[str, float]] = {}

    def sample(self) -> Sample:
        """Return the cost so far, of processes that have ended too."""
        with suppress(psutil.NoSuchProcess):
            # One whose parent has ended is no descendant any more, but was seen before.
            self._living |= set(self._root.children(recursive=True))
        rss = sum(self._look_at(process) for process in list(self._living))
        totals: dict[str, float] = {}
        for kind, seconds in self._cpu.values():
            totals[kind] = totals.get(kind, 0.0) + seconds
        return Sample(time.time(), totals, rss)

    def _look_at(self, process: psutil.Process) -> int:
        """Note a process's CPU seconds and return its resident bytes, 0 when it is gone."""
        try:
            with process.oneshot():
                kind = self._kind_of(process.name(), " ".join(process.cmdline()))
                times = process.cpu_times()
                self._cpu[process] = (kind, times.user + times.system)
                return int(process.memory_info().rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended, or a zombie that shows nothing
            self._living.discard(process)
            return 0


def watch(
    command: Sequence[str], *, file: Path, log: Path, kind_of: Callable[[str, str], str], cwd: Path
) -> Watched:
    """Run `command` to its end, its output in `log`, and note each change of `file`.

    Raises:
        RuntimeError: the command fails; its last words are quoted.
    """
    samples: list[Sample] = []
    changes: list[Change] = []
    started = time.time()
    with log.open("w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd)
    try:
        tree = ProcessTree(running.pid, kind_of)
        while running.poll() is None:
            if not samples or time.time() >= samples[-1].time + SAMPLE_SECONDS:
                samples.append(tree.sample())
            changes += _news(file, changes)
            time.sleep(LOOK_SECONDS)
    finally:
        running.send_signal(signal.SIGINT)  # so that it ends what it has started
        running.wait()
    if running.returncode:
        words = " ".join(log.read_text().split()[-60:])
        raise RuntimeError(f"{command[0]} ended with {running.returncode}: {words}")
    return Watched(started, time.time(), tuple(samples), tuple(changes))


def _news(file: Path, changes: Sequence[Change]) -> list[Change]:
    """Return the change since the last one noted, if there is one."""
    try:
        written = file.stat().st_mtime
        if changes and written == changes[-1].time:
            return []
        return [Change(written, file.read_bytes().count(b"\n"))]
    except FileNotFoundError:
        return []
