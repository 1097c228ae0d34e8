"""A round of three resident nodes with masked sums, compared with the same round in the clear.

A real deployment on this machine: a SuperLink, a site's service that keeps the model loaded, three nodes.
Runs with and without masks take turns. The second exchange, which opens the sum, is printed apart: it is a
message to each node and back, whatever the model.

    python -m scripts.benchmarks secure_round --quick --json
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.models.files import EMBEDDED_ALIAS
from scripts.benchmarks.options import BenchOptions, start_benchmark
from scripts.benchmarks.site import deployed_config, resident_site, rows_of, run_on
from scripts.reports import Goal, figures_table, publish, spread

PLAIN, MASKED = "in the clear", "masked"
_NODES = ("anna", "ben", "cleo")
GOAL_TIMES = 1.1


@dataclass(frozen=True, kw_only=True)
class SecureRoundOptions(BenchOptions):
    """Options of this benchmark."""

    model: str = EMBEDDED_ALIAS


def main(options: SecureRoundOptions) -> dict[str, Any]:
    """Measure both ways in turn."""
    console, environment = start_benchmark(options, ["flwr", "torch", "transformers"])
    turns = 1 if options.quick else options.repetitions
    rounds: dict[str, list[float]] = {PLAIN: [], MASKED: []}  # without the second exchange
    second: dict[str, list[float]] = {PLAIN: [], MASKED: []}
    up: dict[str, list[int]] = {PLAIN: [], MASKED: []}
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as name:
        folder = Path(name)
        with resident_site(folder, rows_of(folder, _NODES)) as link:
            for turn in range(turns):
                for way in (PLAIN, MASKED) if turn % 2 == 0 else (MASKED, PLAIN):
                    config = _config(options, folder / "runs", f"{turn}-{way[:2]}", is_masked=way == MASKED)
                    for record in run_on(link, config):
                        seconds = record["secure"]["seconds"] if record["secure"] else 0.0
                        rounds[way].append(record["seconds"] - seconds)
                        second[way].append(seconds)
                        up[way].append(record["bytes_up"])
                    console.print(f"{way}: rounds of {statistics.median(rounds[way]):.1f} s")
    spreads = {way: {"round_s": spread(rounds[way]), "second_s": spread(second[way])} for way in rounds}
    table = {
        "seconds a round, without the second exchange": [spreads[way]["round_s"].text() for way in spreads],
        "seconds of the second exchange": [spreads[way]["second_s"].text() for way in spreads],
        "MB up a round": [f"{statistics.median(up[way]) / 1e6:.2f}" for way in spreads],
    }
    console.print(figures_table("min, median and max over the inner rounds", tuple(spreads), table))
    times = spreads[MASKED]["round_s"].median / spreads[PLAIN]["round_s"].median
    goals = {"masked round over one in the clear": Goal(times, GOAL_TIMES, at_most=True)}
    figures = {"environment": environment, "model": options.model, "ways": spreads, "times": times}
    return publish(options, "bench_secure_round", figures, goals)


def _config(options: SecureRoundOptions, runs: Path, name: str, *, is_masked: bool) -> RunConfig:
    work: dict[str, Scalar] = {
        "model.name": options.model,
        "federation.num-clients": len(_NODES),
        "federation.num-rounds": 4 if options.quick else 6,
        "aggregation.preset": "rolora",
        "train.local-steps": 4,
        "train.batch-size": 4,
        "secure.method": "masks" if is_masked else "none",
    }
    return deployed_config(options, runs, name, work)
