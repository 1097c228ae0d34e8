"""A round of eight clients on a tiny model, for `scripts/benchmarks/client.py`: fedllm and pfl-research.

The model is a random Llama of four layers, so that what a framework adds to the arithmetic shows. It comes
with two vocabularies: the tokenizer's own, where the output head is most of the work and an engine that forms
only learnt logits gains most, and one so small that the head hardly counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

from clients.tokens import hosted_rows
from fedllm.config.run_config import RunConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import IGNORED, Encoded
from scripts.benchmarks.agreement import checked_difference
from scripts.benchmarks.models import TINY, random_llama
from scripts.benchmarks.peers.shared import TOLERANCE
from scripts.benchmarks.timing import alternate, costs
from scripts.benchmarks.workloads import LORA, SHORT, make_workload
from scripts.reports import spreads_table

OURS, PFL = "fedllm", "pfl-research"
SMALL, WHOLE = "tiny, small vocabulary", "tiny, whole vocabulary"
VOCABULARIES = {SMALL: 4096, WHOLE: 49152}


@dataclass(frozen=True, eq=False)
class Cohort:
    """The clients of a round and the engine that trains them."""

    engine: Engine
    jobs: tuple[Job, ...]


def tiny_model(vocabulary: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random Llama of four layers of width 256, the same every time."""
    return random_llama(TINY, vocab_size=vocabulary).to(dtype)


def tiny_engine(base: BaseModel, vocabulary: int, dtype: torch.dtype = torch.float32) -> Engine:
    """Return an engine on a tiny model, with the tokenizer of `base`."""
    model = tiny_model(vocabulary, dtype)
    tiny = replace(base, model=model, fingerprint=f"tiny-{vocabulary}", dtype=dtype)
    return Engine(tiny, layout_of(model, LORA, tiny.fingerprint))


def make_cohort(base: BaseModel, vocabulary: int, seed: int) -> Cohort:
    """Return the clients of fedllm's default source, in turn with one step of four rows and with two."""
    engine = tiny_engine(base, vocabulary)
    jobs = []
    for number, client in enumerate(hosted_rows(RunConfig(seed=seed), {})):
        shape = replace(SHORT, training=replace(SHORT.training, steps=1 + number % 2))
        work = make_workload(engine, client.train, shape, client_id=client.client_id, seed=seed)
        batches = tuple(tuple(within(row, vocabulary) for row in batch) for batch in work.job.batches)
        jobs.append(replace(work.job, batches=batches))
    return Cohort(engine, tuple(jobs))


def within(row: Encoded, vocabulary: int) -> Encoded:
    """Return a row of the same lengths whose tokens a smaller vocabulary has."""
    labels = tuple(label if label == IGNORED else label % vocabulary for label in row.labels)
    return Encoded(tuple(token % vocabulary for token in row.tokens), labels)


def train_round(cohort: Cohort) -> torch.Tensor:
    """Return the mean of all clients' deltas [P], weighted by their rows: the round as fedllm trains it."""
    results = list(cohort.engine.train(cohort.jobs))
    num_rows = sum(result.num_rows for result in results)
    deltas = torch.stack([result.delta for result in results])
    return torch.tensor([result.num_rows / num_rows for result in results], dtype=deltas.dtype) @ deltas


def compare(cohort: Cohort, repetitions: int) -> dict[str, Any]:
    """Return what a round costs here and with pfl-research, which must give the same adapter.

    Raises:
        RuntimeError: it does not.
    """
    from scripts.benchmarks.peers.pfl import open_simulation, run_round

    engine = cohort.engine
    theirs = tiny_model(engine.base.model.config.vocab_size, engine.base.dtype)
    simulation = open_simulation(theirs, engine.layout, cohort.jobs)
    rounds: dict[str, Callable[[], torch.Tensor]] = {
        OURS: partial(train_round, cohort),
        PFL: partial(run_round, simulation),
    }
    for work in rounds.values():  # warm; and pfl asks for metrics in its first round only
        work()
    found, differences = [], []
    for measured in alternate(rounds, repetitions):
        deltas = {name: one.value for name, one in measured.items()}
        differences.append(checked_difference(deltas, TOLERANCE, OURS))
        found.append(measured)
    timings = {name: [measured[name].timing for measured in found] for name in rounds}
    rows = [row for job in cohort.jobs for batch in job.batches for row in batch]
    return {
        "clients_per_round": len(cohort.jobs),
        "tokens": sum(len(row.tokens) for row in rows),
        "learnt_share": sum(row.num_supervised for row in rows) / sum(len(row.tokens) for row in rows),
        "delta_difference": max(differences),
        "clients": {name: costs(timings[name], timings[OURS]) for name in rounds},
    }


def show(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    """Print the table of one vocabulary."""
    console.print(
        f"\n{name}: {figures['clients_per_round']} clients, {figures['tokens']} tokens,"
        f" {figures['learnt_share']:.0%} learnt; deltas agree to {figures['delta_difference']:.0e}",
        soft_wrap=True,
    )
    console.print(spreads_table(figures["clients"], {"cpu_s": 2, "wall_s": 2, "cpu_ratio": 2}))
