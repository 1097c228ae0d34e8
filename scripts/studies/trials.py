"""Trials: the independent runs a study is made of, done by a few processes, each kept once it is finished.

A trial is a value, so its key says everything its result depends on but the code. A result is one line of a
file; a study that is started again takes what it finds there and does the rest.
"""

import hashlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children, get_context
from os import SEEK_END
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError, DataError, FedLLMError, RunFailedError

Figures: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run: `labels` say where it stands in its study's tables, `flat` which keys it sets.

    `kind` names what is done with the configuration; `options` are numbers and names of that.
    """

    study: str
    kind: str
    labels: Mapping[str, Scalar]
    flat: Mapping[str, Scalar]
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What all trials of a run share; `digest` stands for the contents of the model and of the rows."""

    model: str
    source: str  # as `data.source`
    flat: Mapping[str, Scalar]
    digest: str

    def config(self, trial: Trial, changes: Mapping[str, Scalar] | None = None) -> RunConfig:
        """Return the configuration of a trial's run.

        Raises:
            ConfigError: it is refused.
        """
        base = {"model.name": self.model, "data.source": self.source, **self.flat}
        return RunConfig.from_flat({**base, **trial.flat, **(changes or {})})

    def key(self, trial: Trial) -> str:
        """Return the name (16 hexadecimal digits) under which the result of a trial is kept."""
        parts = [self.digest, dict(self.flat), trial.kind, dict(trial.flat), dict(trial.options)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What a trial gave: figures, or the reason there are none (refused by the configuration, or failed)."""

    trial: Trial
    figures: Figures
    reason: str = ""
    seconds: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether there are figures."""
        return not self.reason


Kinds: TypeAlias = Mapping[str, Callable[[Trial, Setting], Figures]]
RunTrials: TypeAlias = Callable[[Sequence[Trial]], list[Outcome]]  # what a study is given: a `TrialRunner`


@contextmanager
def open_pool(processes: int, threads: int = 0) -> Iterator[Executor | None]:
    """Keep that many processes for trials, or none for one; what still waits at the end is let go.

    Each has so many threads; 0 = torch's own number.
    """
    if processes == 1:
        yield None
        return
    others = set(active_children())
    spawn = get_context("spawn")  # torch's threads survive no fork
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin, initargs=(threads,))
    is_done = False
    try:
        yield pool
        is_done = True
    finally:
        if not is_done:  # by Ctrl-C, say: nobody waits for the trials that are under way
            for process in set(active_children()) - others:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    """Set up a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal's Ctrl-C reaches it too: it ends in silence
    if threads:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class TrialRunner:
    """Where and how trials are done: `journal` keeps results; without a `pool` this process does them."""

    setting: Setting
    kinds: Kinds
    journal: Path
    commit: str
    pool: Executor | None = None
    notice: Callable[[str], None] = lambda line: None

    def __call__(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Return the outcome of every trial, in order; those in the journal are not done again.

        Raises:
            DataError: the journal cannot be read or written.
        """
        kept = read_journal(self.journal)
        keys = [self.setting.key(trial) for trial in trials]
        found = {
            key: _from_line(trial, kept[key]) for key, trial in zip(keys, trials, strict=True) if key in kept
        }
        waiting = {key: trial for key, trial in zip(keys, trials, strict=True) if key not in found}
        if len(found):
            self.notice(f"{len(found)} of {len(set(keys))} trials are in {self.journal.name} already")
        for number, (key, outcome) in enumerate(self._done(waiting), 1):
            self._keep(key, outcome)
            found[key] = outcome
            self.notice(f"{number}/{len(waiting)} {describe(outcome)}")
        return [_relabelled(trial, found[key]) for key, trial in zip(keys, trials, strict=True)]

    def _done(self, trials: Mapping[str, Trial]) -> Iterator[tuple[str, Outcome]]:
        if self.pool is None:
            for key, trial in trials.items():
                yield key, run_trial(trial, self.setting, self.kinds)
            return
        waiting = {
            self.pool.submit(run_trial, trial, self.setting, self.kinds): key for key, trial in trials.items()
        }
        for future in as_completed(waiting):
            try:
                yield waiting[future], future.result()
            except BrokenProcessPool:
                raise RunFailedError(
                    "a process of the trials has died, for want of memory perhaps; finished trials are kept:"
                    " begin again with fewer processes"
                ) from None

    def _keep(self, key: str, outcome: Outcome) -> None:
        line = {
            "key": key,
            "commit": self.commit,
            **{name: asdict(outcome.trial)[name] for name in ("study", "kind", "labels")},
            "seconds": outcome.seconds,
            "reason": outcome.reason,
            "figures": outcome.figures,
        }
        try:
            with self.journal.open("ab+") as file:
                file.seek(max(0, file.seek(0, SEEK_END) - 1))
                cut_short = file.read(1) not in {b"", b"\n"}  # a killed process wrote half a line
                file.write(b"\n" * cut_short + json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise DataError(f"{self.journal}: cannot be written ({error.strerror})") from None


def run_trial(trial: Trial, setting: Setting, kinds: Kinds) -> Outcome:
    """Do one trial in this process; what a configuration or a run refuses becomes the outcome's reason."""
    began = time.perf_counter()
    try:
        with _errors_only():  # cut rows are counted, not told run by run
            figures, reason = kinds[trial.kind](trial, setting), ""
    except ConfigError as error:
        figures, reason = {}, f"refused: {error}"
    except FedLLMError as error:
        figures, reason = {}, f"failed: {error}"
    return Outcome(trial, figures, reason, time.perf_counter() - began)


@contextmanager
def _errors_only() -> Iterator[None]:
    logger = logging.getLogger("fedllm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_journal(path: Path) -> dict[str, Figures]:
    """Return the lines of a journal by key; a last line that was cut short is passed over.

    What was refused is left out, so that it is asked again: the code may have learnt it since.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path}: cannot be read; remove it to start afresh") from None
    kept: dict[str, Figures] = {}
    for line in lines:
        try:
            values = json.loads(line)
            key, reason = values["key"], values["reason"]
        except (ValueError, TypeError, KeyError):
            continue
        if not reason.startswith("refused"):
            kept[key] = values
    return kept


def commits_of(journal: Path) -> list[str]:
    """Return the commits that the trials of a journal were done at; an earlier run may have left some."""
    return sorted({line["commit"] for line in read_journal(journal).values()})


def describe(outcome: Outcome) -> str:
    """Return one line about an outcome: its labels, and its loss or why there is none."""
    trial = outcome.trial
    told = " ".join(
        value if isinstance(value, str) else f"{name}={value:g}" for name, value in trial.labels.items()
    )
    loss = outcome.figures.get("mean_after")
    result = outcome.reason or (f"loss {loss:.4f}" if loss is not None else "done")
    return f"{trial.study}: {told}: {result} ({outcome.seconds:.0f} s)"


def _from_line(trial: Trial, values: Figures) -> Outcome:
    return Outcome(trial, values["figures"], values["reason"], values["seconds"])


def _relabelled(trial: Trial, outcome: Outcome) -> Outcome:
    """Return an outcome under the labels of the trial that asks: equal runs of two studies are done once."""
    return Outcome(trial, outcome.figures, outcome.reason, outcome.seconds)
