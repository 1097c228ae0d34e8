"""One run in a process of its own, for `scripts.benchmarks.round`: what it does, timed round by round.

    python -m scripts.benchmarks.round_worker bare recipe.toml

`bare` trains the clients of every round with `Engine.train` and does nothing else; `local` is the run that
`fedllm run` does in one process, from joining to the published adapter, with the time of its parts.
"""

import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from clients.client_app import app
from clients.process import PROCESS
from fedllm.config.recipe import read_recipe
from fedllm.config.run_config import RunConfig
from fedllm.runs.records import RoundRecord
from scripts.benchmarks.jobs import round_jobs
from scripts.benchmarks.memory import peak_rss
from scripts.runtimes.local import local_grid
from strategies.run import run_federation
from strategies.session import Watch

NODE = {"server-paths": True}  # this process is the data holder, so it opens the paths the recipe names

# The parts of a round: functions that do not call each other, each where its caller looks it up.
PARTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "train": (("fedllm.engine.engine", "Engine.train"),),
    "rows": (("clients.jobs", "make_job"), ("clients.personal", "make_job")),
    "protect": (("clients.protect", "protect"),),
    "wire": (
        *(("fedllm.wire.requests", name) for name in ("write_train_request", "read_train_request")),
        *(("fedllm.wire.replies", name) for name in ("write_updates", "read_updates")),
    ),
    "validate": (("strategies.exchange.receiving", "find_fault"),),
    "aggregate": tuple(("strategies.aggregation.combine", name) for name in ("add", "finish")),
    "checkpoint": (("strategies.run", "save_checkpoint"), ("strategies.run", "write_rounds")),
}


@dataclass(frozen=True)
class RoundEnd:
    """When a round ended, and what had been spent by then, in seconds."""

    time: float  # since the epoch
    cpu: float  # of all processes
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Trace:
    """What a run did: `ends[i]`, `tokens[i]` and `accepted[i]` are round i + 1."""

    ends: tuple[RoundEnd, ...]
    tokens: tuple[int, ...]
    accepted: tuple[int, ...]
    first_losses: Mapping[str, float]  # of every client's training in round 1
    num_values: int  # of an adapter; 0 = not known
    peak_rss: int  # bytes
    peak_gpu: int = 0  # bytes of tensors on this process's CUDA device


def train_only(config: RunConfig) -> Trace:
    """Train every client of every round from the initial adapter: no Flower, no wire, no aggregation.

    All clients take part in every round. Loading and tokenising are over when the first round begins.
    """
    holder = PROCESS.open(config.to_flat(), NODE)
    engine, steps = holder.engine, config.train.local_steps
    rounds = [
        round_jobs(holder, round_num=round_num, steps=steps)
        for round_num in range(1, config.federation.num_rounds + 1)
    ]
    ends: list[RoundEnd] = []
    losses: list[dict[str, float]] = []
    for jobs in rounds:
        results = list(engine.train(jobs))
        ends.append(RoundEnd(time.time(), time.process_time(), {}))
        losses.append({result.client_id: result.loss for result in results})
    return Trace(
        ends=tuple(ends),
        tokens=tuple(sum(job.num_tokens for job in jobs) for jobs in rounds),
        accepted=tuple(map(len, losses)),
        first_losses=losses[0],
        num_values=engine.layout.size,
        peak_rss=peak_rss(),
        peak_gpu=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )


def federate(config: RunConfig) -> Trace:
    """Do the run of `config` in this process and return the time of its rounds and of their parts.

    A round ends where its record is there, so its checkpoint counts for the next one: any two neighbouring
    ends are one of each.
    """
    ends: list[RoundEnd] = []
    with timed_parts() as spent:

        def note(record: RoundRecord) -> None:
            if record.round_num:
                ends.append(RoundEnd(time.time(), time.process_time(), dict(spent)))

        state = run_federation(config, local_grid(config, app), Watch(record=note), resident=PROCESS.resident)
    records = state.records[1:]
    return Trace(
        ends=tuple(ends),
        tokens=tuple(record.training.num_tokens for record in records),
        accepted=tuple(len(record.accepted) for record in records),
        first_losses=dict(records[0].training.losses),
        num_values=state.adapter.layout.size,
        peak_rss=peak_rss(),
        peak_gpu=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )


@contextmanager
def timed_parts() -> Iterator[Mapping[str, float]]:
    """Within the block, add up the wall seconds of every part of a round; yield the sums so far."""
    spent = dict.fromkeys(PARTS, 0.0)
    with ExitStack() as stack:
        for part, places in PARTS.items():
            for module, path in places:
                owner: Any = import_module(module)
                *outer, name = path.split(".")
                for step in outer:
                    owner = getattr(owner, step)
                watched = _timed(getattr(owner, name), spent, part)
                stack.enter_context(mock.patch.object(owner, name, watched))
        yield spent


def _timed(function: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    """Return `function` adding its wall seconds to `spent[part]`; of a generator, while it makes a value."""

    @contextmanager
    def counted() -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            spent[part] += time.perf_counter() - began

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with counted():
            return function(*arguments, **named)

    @wraps(function)
    def iterate(*arguments: Any, **named: Any) -> Iterator[Any]:
        values, nothing = function(*arguments, **named), object()
        while True:
            with counted():
                value = next(values, nothing)
            if value is nothing:
                return
            yield value

    return iterate if inspect.isgeneratorfunction(function) else call


def read_trace(line: str) -> Trace:
    """Return the trace that a worker printed."""
    values = json.loads(line)
    ends = tuple(RoundEnd(**end) for end in values.pop("ends"))
    tokens, accepted = tuple(values.pop("tokens")), tuple(values.pop("accepted"))
    return Trace(ends=ends, tokens=tokens, accepted=accepted, **values)


def main() -> None:
    """Do the run that the command line names, and print its trace as the last line of stdout."""
    kind, recipe = sys.argv[1:]
    config = RunConfig.from_flat(read_recipe(Path(recipe)))
    trace = {"bare": train_only, "local": federate}[kind](config)
    print(json.dumps(asdict(trace)))


if __name__ == "__main__":
    main()
