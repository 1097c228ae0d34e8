"""A round of two sites with a resident service, compared with one in which every message loads the model.

Both are real deployments on this machine, with a SuperLink each, and take turns: a run of a few rounds on
one, then on the other. A site's service answers one node after the other, so what is left of a round without
both its trainings is what Flower, processes and messages cost.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import tomli_w

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.errors import RunFailedError
from fedllm.models.files import EMBEDDED_ALIAS
from fedllm.runs.folder import RESULT, ROUNDS, run_folder
from fedllm.site_policy import load_policy
from scripts.benchmarks.models import write_rows
from scripts.benchmarks.options import BenchOptions, start_benchmark
from scripts.reports import Goal, Spread, figures_table, publish, spread
from scripts.runtimes.processes import Link, free_port, process, superlink, temporary_link
from scripts.runtimes.site import running_site
from scripts.runtimes.submitting import submit

RESIDENT, LOADED = "resident", "loaded for each message"
_NODES = ("anna", "ben")
_LONGEST_SECONDS = 900.0  # of one run


@dataclass(frozen=True, kw_only=True)
class SiteOptions(BenchOptions):
    """Options of this benchmark."""

    model: str = EMBEDDED_ALIAS


@dataclass(frozen=True)
class Measured:
    """What a run's inner rounds took, in seconds: each of them, and each without its training."""

    rounds: tuple[float, ...]
    overheads: tuple[float, ...]


def main(options: SiteOptions) -> dict[str, Any]:
    """Measure both ways in turn."""
    console, environment = start_benchmark(options, ["flwr", "torch", "transformers"])
    turns = 1 if options.quick else options.repetitions
    found: dict[str, list[Measured]] = {RESIDENT: [], LOADED: []}
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        rows = rows_of(folder, _NODES)
        links = {
            RESIDENT: stack.enter_context(resident_site(folder, rows)),
            LOADED: stack.enter_context(_loaded(rows)),
        }
        for turn in range(turns):
            for way in (RESIDENT, LOADED) if turn % 2 == 0 else (LOADED, RESIDENT):
                measured = read_rounds(
                    run_on(links[way], _config(options, folder / "runs", f"{len(found[way])}-{way[:4]}"))
                )
                found[way].append(measured)
                shown = " ".join(f"{seconds:.1f}" for seconds in measured.rounds)
                console.print(
                    f"{way}: rounds of {shown} s,"
                    f" {statistics.median(measured.overheads):.1f} s without training"
                )
    return _publish(options, console, environment, found)


def _publish(
    options: SiteOptions,
    console: Any,
    environment: Mapping[str, Any],
    found: Mapping[str, Sequence[Measured]],
) -> dict[str, Any]:
    spreads: dict[str, dict[str, Spread]] = {
        way: {
            "round_s": spread([one for run in runs for one in run.rounds]),
            "overhead_s": spread([one for run in runs for one in run.overheads]),
        }
        for way, runs in found.items()
    }
    table = {
        name: [spreads[way][key].text() for way in spreads]
        for name, key in (("seconds a round", "round_s"), ("without training", "overhead_s"))
    }
    console.print(figures_table("min, median and max over the inner rounds", tuple(spreads), table))
    times = spreads[LOADED]["round_s"].median / spreads[RESIDENT]["round_s"].median
    goals = {
        "resident is faster by": Goal(times, 5.0),
        "overhead of a resident round, s": Goal(spreads[RESIDENT]["overhead_s"].median, 3.0, at_most=True),
    }
    figures = {"environment": environment, "model": options.model, "ways": spreads, "times": times}
    return publish(options, "bench_site", figures, goals)


def _config(options: SiteOptions, runs: Path, name: str) -> RunConfig:
    work: dict[str, Scalar] = {
        "model.name": options.model,
        "federation.num-clients": len(_NODES),
        "federation.num-rounds": 4,
        "train.local-steps": 1,
        "train.batch-size": 2,
    }
    return deployed_config(options, runs, name, work)


def deployed_config(options: BenchOptions, runs: Path, name: str, changes: Mapping[str, Scalar]) -> RunConfig:
    """Return the configuration of a short run over a real deployment, of rounds and nothing else."""
    return RunConfig.from_flat(
        {
            "run.output": str(runs),
            "run.name": name,
            "model.device": options.device,
            "model.num-threads": options.threads,
            "federation.round-deadline": 600.0,
            "federation.join-deadline": 300.0,
            "train.max-length": 64,
            "distill.when": "never",
            "evaluation.prompts": "",
            **changes,
        }
    )


def rows_of(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Write a file of rows for each client; return them by name."""
    return {name: write_rows(folder / f"{name}.jsonl", 1, rows_per_client=16) for name in names}


def run_on(link: Link, config: RunConfig) -> list[dict[str, Any]]:
    """Do a run and return the records of its inner rounds: the first loads and the last evaluates.

    Raises:
        RunFailedError: it does not complete.
    """
    folder = run_folder(config)
    submit(link, config, {})
    ends = time.monotonic() + _LONGEST_SECONDS
    while not (folder / RESULT).exists() and time.monotonic() < ends:
        time.sleep(0.2)
    result = json.loads((folder / RESULT).read_text()) if (folder / RESULT).exists() else {}
    if result.get("status") != "completed":
        raise RunFailedError(
            f"a run of the benchmark did not complete: {result.get('reason', 'it took too long')}"
        )
    return [json.loads(line) for line in (folder / ROUNDS).read_text().splitlines()][2:-1]


def read_rounds(records: Sequence[Mapping[str, Any]]) -> Measured:
    """Return what the rounds of a run took."""
    return Measured(
        tuple(record["seconds"] for record in records),
        tuple(record["seconds"] - sum(record["training"]["seconds"].values()) for record in records),
    )


@contextmanager
def resident_site(folder: Path, rows: Mapping[str, Path]) -> Iterator[Link]:
    """Run a site of a node for each file of rows, and its server, for the length of the block."""
    with temporary_link(is_hardened=False) as link, superlink(link):
        nodes = {name: {"superlink": link.address, "data": str(file)} for name, file in rows.items()}
        file = folder / "site.toml"
        file.write_text(tomli_w.dumps({"site": {"state-path": str(folder / "state")}, "nodes": nodes}))
        ended = Event()
        with running_site(load_policy(file)) as site:
            tending = Thread(target=site.tend, args=(_ignore, ended.is_set), daemon=True)
            tending.start()
            try:
                yield link
            finally:
                ended.set()
                tending.join()


@contextmanager
def _loaded(rows: Mapping[str, Path]) -> Iterator[Link]:
    """Run two nodes as Flower has them, and their server, for the length of the block."""
    with temporary_link(is_hardened=False) as link, superlink(link), ExitStack() as stack:
        for name, file in rows.items():
            command = ["flower-supernode", "--insecure", "--superlink", link.address]
            command += ["--port", str(free_port())]
            command += ["--node-config", f'data-path="{file}" client-id="{name}"']
            environment = link.environment(name) | {"FEDLLM_SITE": ""}
            stack.enter_context(process(command, link.folder, environment, name))
        yield link


def _ignore(line: str) -> None:
    """A process that is started again shows in the times."""
