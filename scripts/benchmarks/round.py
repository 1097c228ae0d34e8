"""A whole federated round: what surrounds the training, and how it grows with the number of clients.

Runtimes: `fedllm run` as a Flower simulation (a SuperLink, Ray and `flwr run`) and in one process, and a
bare loop that trains the same clients on the same rows and steps with `Engine.train` and does nothing else.
Each is a process of its own with the processes it starts, all of whose CPU is counted. Start-up is apart:
loading, joining and the whole first round. A round lasts from one record to the next, checkpoint included.

Cohorts: a run in one process with 10, 100 and 1,000 clients of a tiny random model, where a round is next to
nothing but what surrounds the arithmetic: seconds of each part, and the most memory the process ever held.

    python -m scripts.benchmarks round --quick --json

Nothing is evaluated in these runs, and every client takes part in every round.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.models.base import choose_device
from scripts.benchmarks.models import save_tiny_model, write_rows
from scripts.benchmarks.options import BenchOptions, start_benchmark
from scripts.benchmarks.runs import UNMEASURED, Run, check_same_work, run_cohort, run_simulation, run_worker
from scripts.benchmarks.timing import alternate
from scripts.charts import Plot, lines
from scripts.recipe_arguments import config_of
from scripts.reports import Goal, Spread, figures_table, publish, ratios, spread, spreads_table

BARE, LOCAL, SIMULATION = "bare loop", "local", "simulation"
PACKAGES = ("fedllm", "flwr", "ray", "torch", "transformers")
READ_OUTS = ("svd", "factor-mean")
GOAL_RATIO = 1.05


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """What can be asked for; --quick is a tiny model, once."""

    part: Annotated[Literal["both", "runtimes", "cohorts"], typer.Option(help="What is measured.")] = "both"
    rounds: Annotated[int, typer.Option(min=2, help="Of a run; the first, with its start-up, apart.")] = 4
    clients: Annotated[int, typer.Option(min=1, help="Of the runtimes' run.")] = 8
    sizes: Annotated[str, typer.Option(help="Clients a round, of the cohorts.")] = "10,100,1000"
    plot: Plot = None


# --- the runtimes compared with the bare loop -------------------------------------------------------------


def compare_runtimes(config: RunConfig, repetitions: int) -> list[dict[str, Run]]:
    """Return, per repetition, the run of `config` in every runtime, all of the same work.

    Raises:
        RuntimeError: two of them did not train on the same rows.
    """
    variants: dict[str, Callable[[], Run]] = {
        BARE: partial(run_worker, "bare", config),
        LOCAL: partial(run_worker, "local", config),
        SIMULATION: partial(run_simulation, config),
    }
    done = []
    for measured in alternate(variants, repetitions):
        runs = {name: measured[name].value for name in variants}
        for name, run in runs.items():
            check_same_work(name, run.trace, runs[BARE].trace)
        done.append(runs)
    return done


def runtime_figures(runs: Sequence[Mapping[str, Run]], name: str) -> dict[str, Any]:
    """Return what the rounds of one runtime cost, and over the bare loop's within each repetition."""
    mine, bare = [one[name] for one in runs], [one[BARE] for one in runs]
    return {
        "round_s": spread([period for run in mine for period in run.periods]),
        "round_cpu_s": spread([period for run in mine for period in run.cpu_periods]),
        "wall_ratio": ratios(_means(mine, "periods"), _means(bare, "periods")),
        "cpu_ratio": ratios(_means(mine, "cpu_periods"), _means(bare, "cpu_periods")),
        "start_s": spread([run.start for run in mine]),
        "close_s": spread([run.close for run in mine]),
        "peak_rss_mb": spread([run.trace.peak_rss / 1e6 for run in mine]),
    }


def _means(runs: Sequence[Run], periods: str) -> list[float]:
    return [statistics.fmean(getattr(run, periods)) for run in runs]


def part_figures(runs: Sequence[Run]) -> dict[str, float]:
    """Return the median seconds of every part of a round, and of what is in none of them."""
    rounds = [parts for run in runs for parts in run.parts()]
    medians = {part: statistics.median(parts[part] for parts in rounds) for part in rounds[0]}
    periods = [period for run in runs for period in run.periods]
    others = [period - sum(parts.values()) for period, parts in zip(periods, rounds, strict=True)]
    return {**medians, "other": statistics.median(others)}


def compared_figures(config: RunConfig, runs: Sequence[Mapping[str, Run]]) -> dict[str, Any]:
    """Return everything the comparison of runtimes found, as the report keeps it."""
    simulated = [parts for one in runs for parts in one[SIMULATION].parts()]
    kinds = sorted({kind for parts in simulated for kind in parts})
    runtimes = {name: runtime_figures(runs, name) for name in runs[0]}
    beyond = runtimes[SIMULATION]["round_s"].median - runtimes[LOCAL]["round_s"].median
    return {
        "model": config.model.name if "/" not in config.model.name else "tiny random Llama",
        "clients": config.federation.num_clients,
        "tokens_per_round": list(runs[0][BARE].trace.tokens),
        "adapter_values": runs[0][BARE].trace.num_values,
        "runtimes": runtimes,
        "local_parts_s": part_figures([one[LOCAL] for one in runs]),
        "simulation_beyond_local_s": beyond,
        "simulation_processes_cpu_s": {
            kind: statistics.median(parts.get(kind, 0.0) for parts in simulated) for kind in kinds
        },
    }


# --- clients a round ---------------------------------------------------------------------------------------


def cohort_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the rounds of one size and read-out cost."""
    trace = runs[0].trace
    return {
        "clients": trace.accepted[0],
        "tokens_per_round": statistics.median(trace.tokens),
        "adapter_values": trace.num_values,
        "round_s": spread([period for run in runs for period in run.periods]),
        "round_cpu_s": spread([period for run in runs for period in run.cpu_periods]),
        "start_s": spread([run.start for run in runs]),
        "peak_rss_mb": spread([run.trace.peak_rss / 1e6 for run in runs]),
        "parts_s": part_figures(runs),
    }


def measure_cohorts(
    sizes: Sequence[int],
    read_outs: Sequence[str],
    repetitions: int,
    rounds: int,
    threads: int,
    device: str,
) -> dict[str, dict[str, Any]]:
    """Return the figures of every read-out and size, by names such as "svd, 1000 clients"."""
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as folder:
        model = save_tiny_model(Path(folder))
        variants = {
            f"{read_out}, {size} clients": partial(run_cohort, model, size, read_out, rounds, threads, device)
            for read_out in read_outs
            for size in sizes
        }
        done = list(alternate(variants, repetitions))
    return {name: cohort_figures([one[name].value for one in done]) for name in variants}


def memory_per_client(cohorts: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return how many float32 adapters of peak memory one more client takes, from fewest to most clients.

    None where all have as many clients.
    """
    by_size = sorted(cohorts.values(), key=lambda figures: int(figures["clients"]))
    fewest, most = by_size[0], by_size[-1]
    grown = 1e6 * (most["peak_rss_mb"].median - fewest["peak_rss_mb"].median)
    more = 4 * most["adapter_values"] * (most["clients"] - fewest["clients"])
    return float(grown / more) if more else None


# --- what a person sees ------------------------------------------------------------------------------------


def show_runtimes(console: Console, figures: Mapping[str, Any]) -> None:
    """Print the tables of the runtimes."""
    tokens = figures["tokens_per_round"]
    console.print(
        f"\n{figures['model']}: {figures['clients']} clients, {statistics.median(tokens):.0f} tokens a round,"
        f" {figures['adapter_values']} values an adapter; {len(tokens) - 1} rounds after the first",
        soft_wrap=True,
    )
    digits = {
        "round_s": 2, "round_cpu_s": 2, "wall_ratio": 3, "cpu_ratio": 3,
        "start_s": 1, "close_s": 1, "peak_rss_mb": 0,
    }  # fmt: skip
    console.print(spreads_table(figures["runtimes"], digits))
    parts = {**figures["local_parts_s"], "simulation beyond local": figures["simulation_beyond_local_s"]}
    rows = {part: [f"{seconds:.3f}"] for part, seconds in parts.items()}
    console.print(figures_table("parts of a local round", ("median wall s",), rows))
    kinds = {kind: [f"{cpu:.2f}"] for kind, cpu in figures["simulation_processes_cpu_s"].items()}
    console.print(figures_table("processes of a simulated round", ("median CPU s",), kinds))


def show_cohorts(console: Console, cohorts: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the tables of the cohorts: one row for each, so that many fit."""
    first = next(iter(cohorts.values()))
    console.print(
        f"\ntiny random Llama in one process: {first['adapter_values']} values an adapter,"
        f" {first['tokens_per_round'] / first['clients']:.0f} tokens a client and round"
    )
    rows = {
        name: [
            figures["round_s"].text(),
            figures["round_cpu_s"].text(),
            f"{1000 * figures['round_s'].median / figures['clients']:.1f}",
            figures["peak_rss_mb"].text(0),
        ]
        for name, figures in cohorts.items()
    }
    columns = ("wall s a round", "CPU s a round", "ms a client", "peak MB")
    console.print(figures_table("min, median and max over the rounds and repetitions", columns, rows))
    parts = {name: [f"{part:.3f}" for part in each["parts_s"].values()] for name, each in cohorts.items()}
    console.print(figures_table("median wall s of each part of a round", tuple(first["parts_s"]), parts))
    growth = memory_per_client(cohorts)
    if growth is not None:
        console.print(f"one more client takes {growth:.2f} float32 adapters of peak memory")


def plot(path: Path, cohorts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write seconds a round over the number of clients, one line a read-out."""
    series: dict[str, list[tuple[float | str, Spread]]] = {}
    for name, figures in cohorts.items():
        series.setdefault(name.partition(",")[0], []).append((figures["clients"], figures["round_s"]))
    lines(path, "A round in one process, tiny model", "clients", "wall seconds a round", series)


@contextmanager
def runtimes_config(options: Options) -> Iterator[RunConfig]:
    """Yield the run that the runtimes do: the quickstart's, or with --quick one of a tiny model."""
    changes: dict[str, Scalar] = {
        **UNMEASURED,
        "federation.num-clients": options.clients,
        "federation.num-rounds": options.rounds,
        "model.num-threads": options.threads,
        "model.device": options.device,
        "model.dtype": "float32" if choose_device(options.device).type == "cpu" else "auto",
    }
    config = config_of([])
    if not options.quick:
        yield config.override(changes)
        return
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as folder:
        model = save_tiny_model(Path(folder) / "model")
        rows = write_rows(Path(folder) / "rows.jsonl", options.clients, rows_per_client=12)
        yield config.override({**changes, "model.name": str(model), "data.source": str(rows)})


def main(options: Options) -> None:
    """Measure, print and keep the figures."""
    console, machine = start_benchmark(options, PACKAGES)
    repetitions = 1 if options.quick else options.repetitions
    figures: dict[str, Any] = {"environment": machine}
    figures["settings"] = {"repetitions": repetitions, "rounds": options.rounds, "threads": options.threads}
    goals = {}
    if options.part != "cohorts":
        with runtimes_config(options) as config:
            found = compared_figures(config, compare_runtimes(config, repetitions))
        figures["runtimes"] = found
        show_runtimes(console, found)
        if not options.quick:  # a tiny model's round is nothing but what surrounds the training
            for name in (LOCAL, SIMULATION):
                ratio = found["runtimes"][name]["wall_ratio"].median
                goals[f"{name}_wall_ratio_vs_bare"] = Goal(ratio, GOAL_RATIO, at_most=True)
    if options.part != "runtimes":
        sizes = [int(size) for size in options.sizes.split(",")]
        read_outs = READ_OUTS[:1] if options.quick else READ_OUTS
        cohorts = measure_cohorts(
            sizes, read_outs, repetitions, options.rounds, options.threads, options.device
        )
        figures |= {"cohorts": cohorts, "adapters_per_client": memory_per_client(cohorts)}
        show_cohorts(console, cohorts)
        goals["clients_in_a_round"] = Goal(max(each["clients"] for each in cohorts.values()), max(sizes))
        if options.plot:
            plot(options.plot, cohorts)
    publish(options, "bench_round", figures, goals)
