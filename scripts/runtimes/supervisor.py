"""A server that goes on: what dies is started again, and the run resumed, until the run says how it ended.

Flower by itself loses a run with its ServerApp, which it misses only after a minute. Here the supervisor sees
at once that the process has ended, and submits the run again: it goes on after its last checkpoint. A
SuperLink or SuperExec that dies comes back on its port, with its database. A run ends by its own word,
`result.json`.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from subprocess import Popen
from typing import Any

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.errors import FedLLMError, RunFailedError
from fedllm.runs.checkpoint import newest_round
from fedllm.runs.folder import CHECKPOINTS, RESULT, run_folder
from scripts.runtimes.guard import family
from scripts.runtimes.processes import Link, stop_run, superexec, superlink
from scripts.runtimes.restarts import MOST_RESTARTS, Restarts
from scripts.runtimes.shown_rounds import ShownRounds, View
from scripts.runtimes.submitting import status, submit

SUPEREXEC = "SuperExec"
_LOOK_SECONDS = 0.25
_START_SECONDS = 60.0  # in which a ServerApp appears, else Flower is asked
_END_SECONDS = 30.0  # that a ServerApp may live on after its run has ended


class GaveUpError(FedLLMError):
    """Something of a run died again and again; what is complete is kept, and a later start resumes it."""


class Kept:
    """A process that can be started again; `open` makes it for the length of a block."""

    def __init__(self, name: str, open_process: Callable[[], AbstractContextManager["Popen[bytes]"]]):
        self.name, self._open = name, open_process
        self._stack: ExitStack = ExitStack()
        self.process: Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, once what is left of the one before has ended.

        Raises:
            RunFailedError: it cannot be started.
        """
        self.stop()
        self.process = self._stack.enter_context(self._open())

    def stop(self) -> None:
        """End it and all it has started."""
        self.process = None
        self._stack.close()

    @property
    def is_alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def how_it_ended(self) -> str:
        """Return its end in words."""
        code = self.process.poll() if self.process else None
        if code is None:
            return "did not start"
        number = -code if code < 0 else code - 128
        return f"was killed by {signal.Signals(number).name}" if number in _SIGNALS else f"ended with {code}"


_SIGNALS = {int(sign) for sign in signal.Signals}


def server_processes(link: Link, variables: Mapping[str, str] | None = None) -> list[Kept]:
    """Return the SuperLink and the SuperExec of a hardened link, not yet started.

    `variables` are added to their environment.
    """
    return [
        Kept("SuperLink", lambda: superlink(link, variables=variables)),
        Kept(SUPEREXEC, lambda: superexec(link, variables)),
    ]


@contextmanager
def started(processes: Sequence[Kept]) -> Iterator[None]:
    """Run processes for the length of the block, however often each is started again in it."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in reversed(processes):
            process.stop()


class Supervisor:
    """One run at a SuperLink, which it holds on to; its processes run already (`started`).

    `until_first_round` are keys of the run that hold while no round is complete.
    """

    def __init__(
        self,
        config: RunConfig,
        link: Link,
        processes: Sequence[Kept],
        view: View,
        *,
        most_restarts: int = MOST_RESTARTS,
        until_first_round: Mapping[str, Scalar] | None = None,
    ):
        self.config, self.link, self.processes, self.view = config, link, processes, view
        self.folder = run_folder(config)
        self._until_first_round = dict(until_first_round or {})
        self.run_id = ""
        self.is_running = False  # whether its ServerApp lives
        self.num_restarts = 0
        self._rounds = ShownRounds(self.folder, view)
        self._restarts = Restarts(most_restarts, round_num=self._done)
        (self.folder / RESULT).unlink(missing_ok=True)  # an earlier attempt's

    def run(self) -> None:
        """Submit the run, again and again, until it leaves its result.

        Raises:
            GaveUpError: it was started again too often without a new round.
        """
        while reason := self._attempt():
            self.is_running = False
            self._again(reason)
            if self.run_id:  # else nodes begin with messages of a run that nobody waits for
                stop_run(self.link, self.run_id)
        self.is_running = False
        self._rounds.show()

    def health(self) -> dict[str, Any]:
        """Return the state of the moment."""
        alive = {process.name: process.is_alive for process in self.processes}
        return {
            "healthy": self.is_running and all(alive.values()),
            "run": self.config.run.name,
            "round": self._done,
            "rounds": self.config.federation.num_rounds,
            "restarts": self.num_restarts,
            "alive": {**alive, "ServerApp": self.is_running},
        }

    @property
    def _done(self) -> int:
        return newest_round(self.folder / CHECKPOINTS)

    def _attempt(self) -> str:
        """Submit the run and wait; return why it has no result, "" where it has."""
        changes: dict[str, Scalar] = {"run.resume": True} if self.num_restarts else {}
        changes |= {} if self._done else self._until_first_round
        try:
            for process in self._dead():  # counted already, by the end of the attempt before
                process.start()
            self.run_id = submit(self.link, self.config.override(changes), {})
        except RunFailedError as error:
            return str(error)
        self.view.notice(f"Flower run {self.run_id} on {self.link.address}")
        asked = time.monotonic()
        while True:
            # Looked at before the result, which a ServerApp writes before it ends.
            was_running, self.is_running = self.is_running, self._lives()
            self._rounds.show()
            if (self.folder / RESULT).exists():
                return self._ended()
            if was_running and not self.is_running:
                ended = [f"the {process.name} {process.how_it_ended()}" for process in self._dead()]
                return "; ".join(ended) or "the ServerApp died"
            self._mend()
            if not self.is_running and time.monotonic() > asked + _START_SECONDS:
                now, asked = status(self.link, self.run_id), time.monotonic()
                if now.startswith("finished"):
                    return f"Flower ended the run as {now}"
            time.sleep(_LOOK_SECONDS)

    def _ended(self) -> str:
        """Wait until the ServerApp of a run that has left its result has ended too; return ""."""
        ends = time.monotonic() + _END_SECONDS
        while self._lives() and time.monotonic() < ends:
            time.sleep(_LOOK_SECONDS)
        return ""

    def _lives(self) -> bool:
        """Return whether the SuperExec has a ServerApp, besides its guard and itself."""
        (executor,) = (each.process for each in self.processes if each.name == SUPEREXEC)
        return executor is not None and len(family({executor.pid})) > 2

    def _dead(self) -> list[Kept]:
        return [process for process in self.processes if not process.is_alive]

    def _mend(self) -> None:
        """Start again each process that has ended."""
        for process in self.processes:
            while not process.is_alive:
                self._again(f"the {process.name} {process.how_it_ended()}")
                try:
                    process.start()
                except RunFailedError as error:
                    self.view.notice(str(error))

    def _again(self, reason: str) -> None:
        """Count a restart and wait as long as it should.

        Raises:
            GaveUpError: it is one too many.
        """
        self._restarts = self._restarts.another(self._done)
        self.num_restarts += 1
        if self._restarts.are_too_many:
            raise GaveUpError(
                f"{reason}; started again {self._restarts.most} times without a new round, {self._done} are"
                f" complete; see {self.link.folder}/*.log, and start it again to go on"
            )
        wait = f" in {self._restarts.pause:g} s" if self._restarts.pause else ""
        self.view.notice(f"{reason}; starting again{wait}, {self._done} rounds are complete")
        time.sleep(self._restarts.pause)
