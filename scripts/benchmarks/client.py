"""One client's round compared with those of other clients, and a round compared with pfl-research.

FlowerTune's kind of client and TRL's trainer (`flowertune.py`, `trl.py` in `scripts/benchmarks/peers`) load
the base model for every round; `Engine.train` finds it and the rows' tokens resident. All get the same start,
rows, order, label masks and AdamW, and must give the same adapter before anything is timed, and again every
time. pfl-research (`scripts/benchmarks/peers/pfl.py`) simulates a whole round on a tiny model.

    python -m scripts.benchmarks client --quick --json
    python -m scripts.benchmarks client --data FOLDER --json      # uneven rows from a file of instructions

The wire is left out on all sides. Dropout is 0, so that results can be compared. What is left easy for each
of the others stands in its own file.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fedllm.errors import MissingExtraError
from scripts.benchmarks import cohort as bench_cohort
from scripts.benchmarks.agreement import TOLERANCES, checked_difference
from scripts.benchmarks.arithmetic import gemm_rate, trunk_weights
from scripts.benchmarks.client_rows import DEFAULT_ROWS, UNEVEN_ROWS, kinds_of_rows
from scripts.benchmarks.cohort_worker import compare_elsewhere
from scripts.benchmarks.options import BenchOptions, start_benchmark
from scripts.benchmarks.peers.flowertune import train_afresh
from scripts.benchmarks.peers.shared import TOLERANCE, Outcome, missing_package, quiet_huggingface
from scripts.benchmarks.timing import Measured, alternate, costs
from scripts.benchmarks.workloads import Bench, Workload, make_workload, needed_flop, open_bench, shortened
from scripts.charts import Plot, bars
from scripts.command_line import Seed
from scripts.reports import Goal, Spread, figures_table, publish, spread, spreads_table

OURS = bench_cohort.OURS
FLOWERTUNE, NO_CHECKPOINTS = "FlowerTune-like", "no checkpointing"
TRL, TRL_AT_BEST = "TRL", "TRL at its best"
PACKAGES = ("fedllm", "torch", "transformers", "peft", "accelerate", "safetensors")
PEAK_TOKENS = 512  # rows of the peak GEMM: more of them change little
WARM_ROWS = 2

Client = Callable[[], Outcome]


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """What can be asked for; --quick is the default rows, twice."""

    seed: Seed = 0
    client: Annotated[str, typer.Option(help="The package whose rows are trained on.")] = "transformers"
    data: Annotated[Path | None, typer.Option(help="A folder of instructions, for the uneven rows.")] = None
    plot: Plot = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the clients cost on one workload: `clients[name][i]` is repetition i."""

    workload: Workload
    needed_flop: float
    device: torch.device
    peak: float  # FLOP per second that counts on it of the fastest GEMM pass
    difference: float  # the largest between two clients' deltas, as peers.shared.TOLERANCE measures it
    clients: Mapping[str, Sequence[Measured[Outcome]]]


def train_resident(bench: Bench, workload: Workload) -> Outcome:
    """Train as fedllm does: the base model and the rows' tokens are already there."""
    (result,) = bench.engine.train([workload.job])
    return Outcome(result.delta, {})


def variants(bench: Bench, workload: Workload, scratch: Path, *, quick: bool) -> dict[str, Client]:
    """Return the clients that are compared, by name; `quick` leaves out what nobody uses as it comes."""
    device = bench.engine.base.device
    afresh = partial(train_afresh, bench.folder, workload, scratch, device=device)
    clients: dict[str, Client] = {OURS: partial(train_resident, bench, workload), FLOWERTUNE: afresh}
    if not quick:
        clients[NO_CHECKPOINTS] = partial(afresh, checkpointing=False)
    if not missing_package("trl"):
        from scripts.benchmarks.peers.trl import train_with_trl

        with_trl = partial(train_with_trl, bench.folder, workload, scratch, device=device)
        clients[TRL] = with_trl
        if not quick:
            clients[TRL_AT_BEST] = partial(with_trl, at_best=True)
    return clients


def measure(
    bench: Bench, workload: Workload, scratch: Path, *, repetitions: int, quick: bool = False
) -> Comparison:
    """Compare the clients on one workload.

    Raises:
        RuntimeError: they did not train the same adapter.
    """
    brief = variants(bench, shortened(workload, WARM_ROWS), scratch, quick=quick)
    tolerance = TOLERANCE if bench.engine.base.dtype == torch.float32 else TOLERANCES[bench.engine.base.dtype]
    checked_difference({name: work().delta for name, work in brief.items()}, tolerance, OURS)  # also warms
    weights = list(trunk_weights(bench.model).values())
    rounds, peaks, differences = [], [], []
    for outcomes in alternate(variants(bench, workload, scratch, quick=quick), repetitions):
        deltas = {name: one.value.delta for name, one in outcomes.items()}
        differences.append(checked_difference(deltas, tolerance, OURS))
        rounds.append(outcomes)
        peaks += [gemm_rate(weights, PEAK_TOKENS) for _ in range(2)]
    return Comparison(
        workload,
        needed_flop(bench.model, workload),
        bench.engine.base.device,
        max(peaks),
        max(differences),
        {name: [outcomes[name] for outcomes in rounds] for name in rounds[0]},
    )


def client_figures(comparison: Comparison, name: str) -> dict[str, Spread]:
    """Return what one client cost over the repetitions."""
    timings = [one.timing for one in comparison.clients[name]]
    least = comparison.needed_flop / comparison.peak  # seconds of the arithmetic alone
    busy = [timing.busy(comparison.device) for timing in timings]
    return {
        **costs(timings, [one.timing for one in comparison.clients[OURS]], comparison.device),
        "tokens_per_cpu_s": spread([comparison.workload.num_tokens / seconds for seconds in busy]),
        "share_of_limit": spread([least / seconds for seconds in busy]),
    }


def phase_figures(comparison: Comparison, name: str) -> dict[str, Spread]:
    """Return the CPU seconds of one client's phases over the repetitions."""
    phases = [one.value.phases for one in comparison.clients[name]]
    return {key: spread([one[key] for one in phases]) for key in phases[0]}


def comparison_figures(comparison: Comparison, source: str) -> dict[str, Any]:
    """Return everything one workload's comparison found, as the report keeps it."""
    workload, names = comparison.workload, tuple(comparison.clients)
    return {
        "source": source,
        "steps": len(workload.job.batches),
        "lengths": [len(row.tokens) for row in workload.rows],
        "tokens": workload.num_tokens,
        "learnt_share": workload.num_learnt / workload.num_tokens,
        "padded_slots_per_token": workload.num_slots / workload.num_tokens,
        "delta_difference": comparison.difference,
        "needed_gflop": comparison.needed_flop / 1e9,
        "peak_gflop_per_cpu_s": comparison.peak / 1e9,
        "clients": {name: client_figures(comparison, name) for name in names},
        "phases_cpu_s": {name: phase_figures(comparison, name) for name in names if name != OURS},
    }


def show(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    """Print one workload's tables."""
    lengths, phases = figures["lengths"], figures["phases_cpu_s"]
    console.print(
        f"\n{name} ({figures['source']}): {len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens,"
        f" {figures['tokens']} in all, {figures['learnt_share']:.0%} learnt,"
        f" {figures['padded_slots_per_token']:.2f} slots per token where padded;"
        f" deltas agree to {figures['delta_difference']:.0e}",
        soft_wrap=True,
    )
    digits = {"cpu_s": 2, "wall_s": 2, "cpu_ratio": 2, "tokens_per_cpu_s": 0, "share_of_limit": 2}
    console.print(spreads_table(figures["clients"], digits))
    columns = list(dict.fromkeys(key for parts in phases.values() for key in parts))
    medians = {
        client: [f"{parts[key].median:.3f}" if key in parts else "" for key in columns]
        for client, parts in phases.items()
    }
    console.print(figures_table("median CPU s of each phase", columns, medians))


def goals_of(rows: Mapping[str, Any], cohorts: Mapping[str, Any]) -> dict[str, Goal]:
    """Return the goals of what was measured: how many times less CPU a round costs here, in the median.

    pfl-research is judged on the small vocabulary, where our advantage is least.
    """
    wanted = {
        "cpu_ratio_vs_flowertune": (rows.get(DEFAULT_ROWS), FLOWERTUNE, 2.0),
        "cpu_ratio_vs_flowertune_uneven": (rows.get(UNEVEN_ROWS), FLOWERTUNE, 3.0),
        "cpu_ratio_vs_trl": (rows.get(DEFAULT_ROWS), TRL, 2.0),
        "cpu_ratio_vs_trl_uneven": (rows.get(UNEVEN_ROWS), TRL, 2.0),
        "cpu_ratio_vs_pfl": (cohorts.get(bench_cohort.SMALL), bench_cohort.PFL, 1.5),
    }
    return {
        key: Goal(figures["clients"][peer]["cpu_ratio"].median, goal)
        for key, (figures, peer, goal) in wanted.items()
        if figures and peer in figures["clients"]
    }


def main(options: Options) -> None:
    """Measure, print and keep the figures."""
    options = replace(options, repetitions=2) if options.quick else options
    packages = PACKAGES if missing_package("trl") else (*PACKAGES, "trl")
    console, machine = start_benchmark(options, packages)
    figures, goals = compare(options, console, machine)
    if options.plot:
        draw(options.plot, figures)
    publish(options, "bench_client", figures, goals)


def draw(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw how many times fedllm's CPU seconds each client takes, by kind of rows."""
    groups = {
        name: {client: numbers["cpu_ratio"] for client, numbers in rows["clients"].items()}
        for name, rows in figures["rows"].items()
    }
    bars(path, "One client's round", "CPU seconds over fedllm's", groups, reference=1.0)


def compare(
    options: Options, console: Console, machine: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Goal]]:
    """Return the figures and goals of all comparisons, and print each when it is done.

    Raises:
        FedLLMError: there is no such client or no such data.
        RuntimeError: two did not train the same adapter.
    """
    left_out = {TRL: line} if (line := missing_package("trl")) else {}
    bench = open_bench(options.client, options.seed, options.device)
    with quiet_huggingface():
        rows = compare_clients(bench, options, console)
    try:
        cohorts = compare_cohorts(options, console)
    except MissingExtraError as error:
        cohorts, left_out = {}, {**left_out, bench_cohort.PFL: str(error)}
    for line in left_out.values():
        console.print(line)
    settings = {
        "seed": options.seed,
        "client": options.client,
        "repetitions": options.repetitions,
        "token_budget": bench.engine.token_budget,
    }
    found = {"rows": rows, "cohorts": cohorts}
    figures = {"environment": machine, "settings": settings, "left_out": left_out, **found}
    return figures, goals_of(rows, cohorts)


def compare_clients(bench: Bench, options: Options, console: Console) -> dict[str, Any]:
    """Return the figures of one client's round on every kind of rows, by its name."""
    kinds = kinds_of_rows(bench, options.data, quick=options.quick)
    if UNEVEN_ROWS in kinds and options.data is None:
        console.print("no --data: the uneven rows are docstrings, not instructions")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind in kinds.items():
            workload = make_workload(
                bench.engine, kind.examples, kind.shape, client_id=bench.client_id, seed=bench.seed
            )
            found = measure(
                bench, workload, Path(scratch), repetitions=options.repetitions, quick=options.quick
            )
            figures[name] = comparison_figures(found, kind.source)
            show(console, name, figures[name])
    return figures


def compare_cohorts(options: Options, console: Console) -> dict[str, Any]:
    """Return a round's figures compared with pfl-research, by vocabulary; print each."""
    figures = compare_elsewhere(
        seed=options.seed,
        repetitions=options.repetitions,
        threads=options.threads,
        quick=options.quick,
    )
    for name, found in figures.items():
        bench_cohort.show(console, name, found)
    return figures
