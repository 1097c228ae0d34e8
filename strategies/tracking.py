"""Figures of each round, sent to the trackers of `track.to` as soon as the round is saved.

They are numbers over all clients, under the flat names that trainers use (`train/loss`, `eval/loss`). No
client is named and no path: a tracker may be a service of somebody else. `tracking.json` in the run folder
says what each tracker has, so that a resumed run goes on in the same tracked run and sends what is missing.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.config.key import Scalar
from fedllm.config.run_config import KEYS, RunConfig
from fedllm.files import write_file
from fedllm.messages import JoinedClient
from fedllm.models.files import resolve_model
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import TRACKING
from fedllm.runs.records import RoundRecord
from fedllm.runs.spread import spread_of
from strategies.session import Watch
from strategies.trackers import OPENERS, RunToTrack, Tracker, tracker_names

_LONGEST_WORDS = 200  # of what a tracker says went wrong


@contextmanager
def tracked(folder: Path, config: RunConfig, watch: Watch) -> Iterator[Watch]:
    """Yield `watch` with ears that send the figures of the run in `folder` to its trackers.

    Raises:
        MissingExtraError: the package of a tracker is not installed.
    """
    run = RunToTrack(config.run.name, folder, {})
    followers = [Follower(name, run, config, watch.notice) for name in tracker_names(config.track.to)]
    if not followers:
        yield watch
        return
    is_complete = False

    def joined(clients: Mapping[str, JoinedClient]) -> None:
        watch.joined(clients)
        for follower in followers:  # so that whoever looks sees the run from its start
            follower.send(())

    def saved(state: ServerState) -> None:
        watch.saved(state)
        for follower in followers:
            follower.send(state.records)

    try:
        yield replace(watch, joined=joined, saved=saved)
        is_complete = True
    finally:
        for follower in followers:
            follower.close(is_complete)


@dataclass(eq=False)
class Follower:
    """One tracker while its run goes on. Whatever goes wrong with it is said once and never ends the run.

    After a failure it is left alone for a round, then for two, four and so on, since a server that does not
    answer costs a wait each time; at the end of the run it is tried once more.
    """

    name: str
    run: RunToTrack
    config: RunConfig
    notice: Callable[[str], None]
    tracker: Tracker | None = None
    waiting: tuple[RoundRecord, ...] = ()  # the records of the run so far
    num_failures: int = 0
    num_to_wait: int = 0  # calls of `send` that do nothing
    known_as: str = ""
    last_sent: int = -1  # a round
    its_figures: tuple[str, ...] = ()

    def send(self, records: Sequence[RoundRecord]) -> None:
        """Send what the tracker does not have yet of `records`, all that the run has."""
        self.waiting = tuple(records)
        if self.num_to_wait:
            self.num_to_wait -= 1
        else:
            self._tried(self._send)

    def close(self, is_complete: bool) -> None:
        """Send what is still missing, and tell the tracker how the run ended."""

        def end() -> None:
            self._send()
            if self.tracker is not None:
                self.tracker.close(is_complete)

        self._tried(end)

    def _tried(self, work: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # some print, and stdout may be one JSON object
                work()
        except Exception as error:
            if not self.num_failures:
                # An address may hold a password.
                words = re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))[:_LONGEST_WORDS]
                self.notice(
                    f"track.to = {self.name}: {type(error).__name__}: {words}; the run goes on, and what is"
                    " missing is sent later"
                )
            self.num_failures += 1
            self.num_to_wait = 2 ** (self.num_failures - 1)

    def _send(self) -> None:
        self.tracker = self.tracker or self._opened()
        for record in self.waiting:
            figures = figures_of(record)
            new = figures
            if record.round_num == self.last_sent:  # its held-out losses may come a round later
                new = {name: value for name, value in figures.items() if name not in self.its_figures}
            if record.round_num >= self.last_sent and new:
                self.tracker.log(record.round_num, new)
                self.last_sent, self.its_figures = record.round_num, tuple(figures)
                self._keep()

    def _opened(self) -> Tracker:
        earlier = self._kept().get(self.name, {})
        self.known_as, self.last_sent = earlier.get("known_as", ""), earlier.get("round", -1)
        self.its_figures = tuple(earlier.get("figures", ()))
        tracker = OPENERS[self.name](replace(self.run, keys=told_keys(self.config), known_as=self.known_as))
        self.known_as = tracker.known_as
        self._keep()
        return tracker

    def _kept(self) -> dict[str, Any]:
        file = self.run.folder / TRACKING
        return json.loads(file.read_text()) if file.exists() else {}

    def _keep(self) -> None:
        mine = {"known_as": self.known_as, "round": self.last_sent, "figures": self.its_figures}
        write_file(self.run.folder / TRACKING, json.dumps(self._kept() | {self.name: mine}, indent=1) + "\n")


def figures_of(record: RoundRecord) -> dict[str, float]:
    """Return the figures of a round under flat names, without those that were not measured or are not finite.

    Under a privacy plan numbers of clients, tokens and bytes are left out: they tell who took part, and have
    no noise.
    """
    training, aggregation, step = record.training, record.aggregation, record.distillation
    found: dict[str, float | None] = {"round/seconds": record.seconds, "train/loss": training.loss}
    if record.held_out:
        spread = spread_of(record.held_out)
        found |= {"eval/loss": spread.mean, "eval/worst": spread.worst, "eval/deviation": spread.deviation}
    if record.personal_held_out:
        found["eval/personal"] = spread_of(record.personal_held_out).mean
    if record.round_num:  # else it is the base model, before any training
        found |= {"train/learning_rate": training.learning_rate, "aggregation/rho": aggregation.rho}
        found |= {"aggregation/kept_energy": aggregation.kept_energy}
    if step and step.losses:
        found |= {"distillation/before": step.losses.held_out.before}
        found |= {"distillation/after": step.losses.held_out.after}
    if record.at_home and (home := record.at_home).home:  # measured after the last round
        columns = {"alone": home.alone, "shared": home.shared, "loss": home.home}
        found |= {f"home/{name}": spread_of(losses).mean for name, losses in columns.items()}
        found["home/gained"] = len(home.gained) / len(home.home)
    if privacy := record.privacy:
        found |= {"privacy/epsilon": privacy.epsilon, "privacy/clip": privacy.clip}
        found |= {"privacy/noise_multiplier": privacy.noise_multiplier}
    elif record.round_num:
        found |= {"bytes/up": record.bytes_up, "bytes/down": record.bytes_down}
        found |= {"cohort/accepted": len(record.accepted), "cohort/lost": len(record.lost)}
        found |= {"train/tokens": training.num_tokens, "aggregation/delta_norm": aggregation.delta_norm}
    return {name: float(each) for name, each in found.items() if each is not None and math.isfinite(each)}


def told_keys(config: RunConfig) -> dict[str, Scalar]:
    """Return the keys that trackers are told: numbers and declared words. Other text may name people."""
    told = {
        name: value
        for name, value in config.to_flat().items()
        if KEYS[name].words or not isinstance(value, str)
    }
    return {**told, "base model": resolve_model(config.model.name).public_name}
