"""Whole runs for `scripts.benchmarks.round`, each in processes of its own, watched from outside."""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.runs.folder import run_folder, to_toml
from scripts.benchmarks.models import write_rows
from scripts.benchmarks.processes import Watched, watch
from scripts.benchmarks.round_worker import RoundEnd, Trace, read_trace

ROOT = Path(__file__).parents[2]
UNMEASURED: Mapping[str, Scalar] = {
    "evaluation.prompts": "",
    "data.held-out-fraction": 0.0,
    "distill.when": "never",
}


@dataclass(frozen=True)
class Run:
    """A run from the start of its first process to the end of its last, in seconds since the epoch."""

    started: float
    ended: float
    trace: Trace

    @property
    def periods(self) -> list[float]:
        """Wall seconds of every round but the first."""
        return [after.time - before.time for before, after in pairwise(self.trace.ends)]

    @property
    def cpu_periods(self) -> list[float]:
        """CPU seconds of every round but the first."""
        return [after.cpu - before.cpu for before, after in pairwise(self.trace.ends)]

    @property
    def start(self) -> float:
        """Wall seconds before the rounds: to the end of the first, less what a round takes."""
        return self.trace.ends[0].time - self.started - statistics.median(self.periods)

    @property
    def close(self) -> float:
        """Wall seconds after the last round."""
        return self.ended - self.trace.ends[-1].time

    def parts(self) -> list[dict[str, float]]:
        """Return the seconds of each part, of every round but the first."""
        return [
            {part: after.parts[part] - before.parts[part] for part in after.parts}
            for before, after in pairwise(self.trace.ends)
        ]


@contextmanager
def recipe_of(config: RunConfig) -> Iterator[tuple[RunConfig, Path]]:
    """Yield `config` with a folder of its own for what it leaves, and the recipe file that says so."""
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as folder:
        config = config.override({"run.output": str(Path(folder) / "runs")})
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(to_toml(config))
        yield config, recipe


def run_worker(kind: str, config: RunConfig) -> Run:
    """Do the run "bare" or "local" of `scripts.benchmarks.round_worker` in a fresh process."""
    command = [sys.executable, "-m", "scripts.benchmarks.round_worker", kind]
    with recipe_of(config) as (config, recipe):
        watched = watch(
            [*command, str(recipe)],
            file=recipe,
            log=recipe.with_suffix(".log"),
            kind_of=process_kind,
            cwd=ROOT,
        )
        trace = read_trace(recipe.with_suffix(".log").read_text().splitlines()[-1])
    return Run(watched.started, watched.ended, trace)


def run_simulation(config: RunConfig) -> Run:
    """Do the run as `fedllm run --runtime simulation`, and read its rounds off its run folder."""
    command = [sys.executable, "-m", "fedllm", "run"]
    with recipe_of(config) as (config, recipe):
        rounds = run_folder(config) / "rounds.jsonl"
        watched = watch(
            [*command, str(recipe), "--runtime", "simulation", "--json"],
            file=rounds,
            log=recipe.with_suffix(".log"),
            kind_of=process_kind,
            cwd=ROOT,
        )
        records = [json.loads(line) for line in rounds.read_text().splitlines()][1:]
    return Run(watched.started, watched.ended, trace_of(watched, records))


def trace_of(watched: Watched, records: Sequence[Mapping[str, Any]]) -> Trace:
    """Return the trace of a run whose `rounds.jsonl` was watched; its parts are kinds of processes."""
    seen = {
        change.num_lines - 1: change.time for change in watched.changes
    }  # the first line is the base model
    times = np.interp(range(1, len(records) + 1), list(seen), list(seen.values()))  # a look may miss one
    spent = [watched.cpu_at(float(time)) for time in times]
    return Trace(
        ends=tuple(
            RoundEnd(float(time), sum(kinds.values()), kinds)
            for time, kinds in zip(times, spent, strict=True)
        ),
        tokens=tuple(record["training"]["num_tokens"] for record in records),
        accepted=tuple(len(record["accepted"]) for record in records),
        first_losses=records[0]["training"]["losses"],
        num_values=0,
        peak_rss=max(sample.rss for sample in watched.samples),
    )


def process_kind(name: str, command: str) -> str:
    """Return what a process of a simulation is for."""
    if "ClientAppActor" in name:
        return "clients"
    if "flwr-simulation" in command:
        return "server"
    if "ray" in name or "/ray/" in command or name == "gcs_server":
        return "Ray"
    return "SuperLink" if "flower-super" in command else "fedllm run"


def run_cohort(
    model: Path | str, num_clients: int, read_out: str, rounds: int, threads: int, device: str = "cpu"
) -> Run:
    """Do a run of clients of four rows in one fresh process, every client in every round.

    Raises:
        RuntimeError: an update was not accepted.
    """
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", num_clients, rows_per_client=6)
        config = RunConfig.from_flat(
            {
                **UNMEASURED,
                "model.name": str(model),
                "model.device": device,
                "model.num-threads": threads,
                "data.source": str(rows),
                "federation.num-clients": num_clients,
                "federation.num-rounds": rounds,
                "train.local-steps": 2,
                "train.batch-size": 2,
                "aggregation.read-out": read_out,
            }
        )
        run = run_worker("local", config)
    if set(run.trace.accepted) != {num_clients}:
        raise RuntimeError(f"{num_clients} clients: {run.trace.accepted} updates were accepted")
    return run


def check_same_work(name: str, trace: Trace, bare: Trace) -> None:
    """Compare what was trained: tokens and clients of every round, losses of the first.

    Raises:
        RuntimeError: they differ, so that times cannot be compared.
    """
    if (trace.tokens, trace.accepted) != (bare.tokens, bare.accepted):
        raise RuntimeError(f"{name} trained on {trace.tokens} tokens a round, the bare loop on {bare.tokens}")
    for client, loss in bare.first_losses.items():
        if not abs(trace.first_losses[client] - loss) <= 1e-6 * loss:
            raise RuntimeError(f"{name}: client {client} did not train on the rows of the bare loop")
