"""One round of pfl-research 0.6 (apple/pfl-research, arXiv 2404.06430), which trains client after client.

Built as its LLM benchmark is: a PEFT model with a `loss`, PyTorchModel, SimulatedBackend, FederatedAveraging
with clients weighted by their rows, and plain averaging at the server (SGD at 1). The model stays in memory
from round to round, as ours does, and the rows are tokens before the round begins. Chosen for equal results:
AdamW as the local optimizer (its benchmark takes SGD). Chosen in its favour: every batch is padded to its own
longest row, not to the client's, and no client is evaluated. Its loss forms the logits of every token, as its
benchmark's does.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import peft
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel

from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.jobs import Job
from fedllm.models.chat import IGNORED, Encoded
from scripts.benchmarks.peers.shared import peft_config, read_adapter, set_adapter

_NEVER = 10**9  # as a frequency of evaluation


@dataclass(frozen=True, eq=False)
class Simulation:
    """A simulator that holds its model and its clients' rows, and trains the same round again and again."""

    network: Any  # the PEFT model
    model: PyTorchModel
    backend: SimulatedBackend
    algorithm: FederatedAveraging
    numbers: NNTrainHyperParams
    num_clients: int
    layout: AdapterLayout
    start: torch.Tensor  # [P]
    rounds: Iterator[int] = field(default_factory=lambda: count(1))


def open_simulation(network: Any, layout: AdapterLayout, jobs: Sequence[Job]) -> Simulation:
    """Return a simulator of a round of `jobs` on a base model that is its own: PEFT changes it.

    All jobs start from one adapter and share the numbers of their steps.
    """
    training, start = jobs[0].training, jobs[0].start
    network = peft.get_peft_model(network, peft_config(layout))
    network.loss = lambda **batch: network(**batch).loss
    # Asked for before and after each client's training in the first round only, whatever the frequency.
    network.metrics = lambda **batch: {"rows": Weighted.from_unweighted(len(batch["labels"]))}
    set_adapter(network, layout, start)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    model = PyTorchModel(
        network,
        partial(torch.optim.AdamW, weight_decay=training.weight_decay),
        torch.optim.SGD(trained, lr=1.0),
    )
    users = {job.client_id: PyTorchDataDataset(_rows(job), collate_fn=padded) for job in jobs}
    population = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(list(users)))
    numbers = NNTrainHyperParams(
        local_num_epochs=1,
        local_batch_size=training.batch_size,
        local_learning_rate=training.learning_rate,
        local_max_grad_norm=training.clip_norm or None,
    )
    backend = SimulatedBackend(population, population, [WeightByDatapoints()])
    return Simulation(network, model, backend, FederatedAveraging(), numbers, len(users), layout, start)


def run_round(simulation: Simulation) -> torch.Tensor:
    """Return the mean of the clients' deltas [P], weighted by rows, of one round from the same start."""
    set_adapter(simulation.network, simulation.layout, simulation.start)
    algorithm_numbers = NNAlgorithmParams(
        central_num_iterations=next(simulation.rounds),  # it counts on from run to run: one more is one round
        evaluation_frequency=_NEVER,
        train_cohort_size=simulation.num_clients,
        val_cohort_size=0,
    )
    with _event_loop():
        simulation.algorithm.run(
            algorithm_numbers,
            simulation.backend,
            simulation.model,
            simulation.numbers,
            send_metrics_to_platform=False,
        )
    return read_adapter(simulation.network, simulation.layout) - simulation.start


def padded(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Return a batch of rows, each filled up to the longest."""
    longest = max(len(row.tokens) for row in rows)

    def filled(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([filled(row.tokens, 0) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row.tokens), 0) for row in rows]),
        "labels": torch.tensor([filled(row.labels, IGNORED) for row in rows]),
    }


def _rows(job: Job) -> list[Encoded]:
    return [row for batch in job.batches for row in batch]


@contextmanager
def _event_loop() -> Iterator[None]:
    """Have an event loop: pfl takes the current one, which Python no longer makes unasked."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)
        loop.close()
