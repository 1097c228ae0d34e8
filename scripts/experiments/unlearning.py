"""What it costs to forget a client with the same bits (class A), against training again without it.

Two counts and a clock, for two sizes of federation:

    kept       rounds before the first that another client would make different by leaving: with keyed cohorts
               and, as a control, with cohorts of `random.sample`, where a missing client changes every draw
    again      rounds that a run does again for one client, and its seconds
    retrained  the same for all rounds, as a run that never had the client

The client is the one whose first turn is the middle one of all. Both adapters must have the same bits.

    python -m scripts.experiments unlearning --quick --json
    python -m scripts.experiments unlearning --model smollm2-135m-instruct --json
"""

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from clients.client_app import app
from clients.process import PROCESS
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.messages import JoinedClient
from fedllm.plan.cohort import CohortPlan
from fedllm.runs.checkpoint import ServerState, saved_rounds
from fedllm.runs.folder import CHECKPOINTS, run_folder, write_left_out
from fedllm.seeds import derive_seed
from scripts.experiments.corpus import write_rows
from scripts.experiments.options import (
    ONE_THREAD,
    PACKAGES,
    ExperimentOptions,
    model_of,
    open_console,
    size_of,
    text_of,
    work_folder,
)
from scripts.experiments.small_model import Recipe
from scripts.reports import Goal, environment, figures_table, publish
from scripts.runtimes.local import local_grid
from strategies.cohort.selection import choose_clients
from strategies.run import run_federation
from strategies.unlearning.guarantee import guarantee_of
from strategies.unlearning.replay import begin_replay, replayed_config

Draw = Callable[[Sequence[str], int], Sequence[str]]  # clients, round -> cohort
FIGURES = ("kept, keyed", "kept, random.sample", "again", "again s", "retrained s", "checkpoints", "MB")


@dataclass(frozen=True)
class Federation:
    """How many clients there are, how many a round asks and how many rounds there are."""

    clients: int
    cohort: int
    rounds: int

    @property
    def name(self) -> str:
        """Its numbers, as the figures have them."""
        return f"{self.clients}_clients_{self.cohort}_a_round_{self.rounds}_rounds"


@dataclass(frozen=True)
class Size:
    """One size of the experiment; `flat` holds the keys of all runs."""

    federations: tuple[Federation, ...]
    flat: Mapping[str, Scalar]
    rows_of_domain: int
    draws: int  # seeds over which cohorts are counted
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: Recipe | None = None


_FLAT: dict[str, Scalar] = {
    **ONE_THREAD,
    **{"lora.rank": 8, "lora.alpha": 16.0, "train.local-steps": 2, "train.batch-size": 2},
    **{"train.max-length": 128, "train.learning-rate": 1e-2, "data.max-held-out": 1},
}
FULL = Size((Federation(20, 4, 50), Federation(100, 10, 50)), _FLAT, 100, draws=200, recipe=Recipe())
QUICK = Size(
    (Federation(6, 2, 6), Federation(12, 2, 6)), _FLAT, 10, draws=50, seeds=(0,), recipe=Recipe(steps=60)
)
SMOLLM2 = Size(
    (Federation(7, 2, 4),),
    {**_FLAT, "train.max-length": 160, "train.learning-rate": 1e-3},
    rows_of_domain=20,
    draws=200,
)


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    """What can be asked for."""


def kept_rounds(size: Federation, draw: Draw) -> float:
    """Return how many rounds a run keeps for a client, the mean over the clients.

    A round is kept where it and all before it draw the same without the client.
    """
    names = [f"c{number:03d}" for number in range(size.clients)]
    cohorts = [tuple(draw(names, number)) for number in range(1, size.rounds + 1)]
    kept = []
    for gone in names:
        rest = [name for name in names if name != gone]
        same = (tuple(draw(rest, number)) == cohort for number, cohort in enumerate(cohorts, 1))
        kept.append(next((number for number, is_same in enumerate(same) if not is_same), size.rounds))
    return fmean(kept)


def keyed(size: Federation, seed: int) -> Draw:
    """Return the draw of a run under federation.selection = "uniform"."""
    plan = CohortPlan(rule="uniform", size=size.cohort, num_clients=size.clients)

    def draw(names: Sequence[str], round_num: int) -> Sequence[str]:
        joined = [
            JoinedClient(client_id=name, node_id=0, num_train=1, num_held_out=0, fingerprint="")
            for name in names
        ]
        return choose_clients(joined, (), cohort=plan, seed=seed, round_num=round_num, attempt=1)

    return draw


def sampled(size: Federation, seed: int) -> Draw:
    """Return the control: each round's cohort by `random.sample`, seeded by run and round."""

    def draw(names: Sequence[str], round_num: int) -> Sequence[str]:
        return sorted(random.Random(derive_seed(seed, "cohort", round_num)).sample(list(names), size.cohort))

    return draw


def costs_of(config: RunConfig) -> dict[str, float]:
    """Do a run, forget a client in two ways; return what each took, and whether both gave the same bits."""
    folder = run_folder(config)
    for old in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(old)
    whole, _ = _timed(config)
    first_turns: dict[str, int] = {}
    for record in whole.records:
        for name in record.asked:
            first_turns.setdefault(name, record.round_num)
    client = sorted(first_turns, key=lambda name: (first_turns[name], name))[len(first_turns) // 2]
    guarantee = guarantee_of(folder, client)
    begin_replay(folder, client, guarantee, f"{folder.name}-again")
    again, seconds = _timed(replayed_config(folder, f"{folder.name}-again"))
    anew = config.override({"run.name": f"{folder.name}-retrained"})
    write_left_out(run_folder(anew), [client])
    retrained, full_seconds = _timed(anew)
    kept = [folder / CHECKPOINTS / f"round-{number:05d}" for number in saved_rounds(folder / CHECKPOINTS)]
    return {
        "again": guarantee.num_again,
        "again s": seconds,
        "retrained s": full_seconds,
        "same bits": float(again.adapter.digest == retrained.adapter.digest != whole.adapter.digest),
        "checkpoints": len(kept),
        "MB": sum(file.stat().st_size for path in kept for file in path.iterdir()) / 1e6,
    }


def _timed(config: RunConfig) -> tuple[ServerState, float]:
    began = time.perf_counter()
    state = run_federation(config, local_grid(config, app), resident=PROCESS.resident)
    return state, time.perf_counter() - began


def figures_of(size: Size, federation: Federation, flat: Mapping[str, Scalar], work: Path) -> dict[str, Any]:
    """Return the figures of one federation: counts over many seeds, costs as means over a few runs."""
    numbers = {
        "federation.num-clients": federation.clients,
        "federation.cohort": federation.cohort,
        "federation.num-rounds": federation.rounds,
    }
    seeds = [
        costs_of(
            RunConfig.from_flat(
                {
                    **flat,
                    **numbers,
                    "seed": seed,
                    "run.output": str(work),
                    "run.name": f"{federation.name}-{seed}",
                }
            )
        )
        for seed in size.seeds
    ]
    counts = {
        "kept, keyed": fmean(kept_rounds(federation, keyed(federation, seed)) for seed in range(size.draws)),
        "kept, random.sample": fmean(
            kept_rounds(federation, sampled(federation, seed)) for seed in range(size.draws)
        ),
    }
    return {**counts, **{name: fmean(one[name] for one in seeds) for name in seeds[0]}}


def goals_of(found: Mapping[str, Mapping[str, float]]) -> dict[str, Goal]:
    """Return the goals: always the same bits, and keyed cohorts keep rounds that others would not."""
    goals = {f"same_bits_{name}": Goal(figures["same bits"], 1.0) for name, figures in found.items()}
    for name, figures in found.items():
        goals[f"kept_over_sampled_{name}"] = Goal(
            figures["kept, keyed"] / figures["kept, random.sample"], 2.0
        )
    return goals


def main(options: Options) -> None:
    """Do the experiment, print and keep its figures."""
    console = open_console(options)
    size = size_of(options, full=FULL, quick=QUICK, embedded=SMOLLM2)
    corpus = text_of(options, size, console)
    model, described = model_of(options.model, size.recipe, corpus, console)
    work, found = work_folder(options, "unlearning").resolve(), {}
    for federation in size.federations:
        console.print(
            f"{federation.clients} clients, {federation.cohort} a round, {federation.rounds} rounds"
        )
        rows = [
            {**row, "client": f"c{number % federation.clients:03d}"} for number, row in enumerate(corpus.rows)
        ]
        file = write_rows(work / f"rows-{federation.clients}.jsonl", rows)
        flat = {**size.flat, "model.name": model, "data.source": str(file)}
        found[federation.name] = figures_of(size, federation, flat, work)
    rows_shown = {name: [f"{figures[one]:.3g}" for one in FIGURES] for name, figures in found.items()}
    console.print(figures_table("means over the seeds", FIGURES, rows_shown))
    figures: dict[str, Any] = {
        "environment": environment(PACKAGES),
        "model": described,
        "settings": {
            "quick": options.quick,
            "flat": dict(size.flat),
            "seeds": len(size.seeds),
            "draws": size.draws,
        },
        "federations": found,
    }
    publish(options, "unlearning", figures, goals_of(found))
