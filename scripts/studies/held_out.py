"""The clients of a study, and the losses of adapters on what they hold out.

A client's held-out rows are in two halves: one chooses (a number of steps, a learning rate), the other
measures what was chosen. All methods of a study choose and measure on the same halves.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

import torch

from clients.at_home import can_choose, split_held_out
from clients.data_holder import DataHolder
from clients.process import PROCESS
from fedllm.config.run_config import RunConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import NoDataError
from fedllm.models.chat import Encoded

Rows: TypeAlias = tuple[Encoded, ...]
Vectors: TypeAlias = Mapping[str, torch.Tensor]  # client -> its adapter [P]; clients may share one object
OTHERS_ROWS = 64  # that stand for the text of all clients


@dataclass(frozen=True, eq=False)
class Clients:
    """All clients of a run on this machine; only those that can choose and measure are in the two halves."""

    holder: DataHolder
    choosing: Mapping[str, Rows]
    measuring: Mapping[str, Rows]

    @property
    def engine(self) -> Engine:
        """The engine they share."""
        return self.holder.engine

    @property
    def sample(self) -> dict[str, Rows]:
        """The first measuring rows of each client, about `OTHERS_ROWS` in all: each adapter reads them."""
        each = max(1, OTHERS_ROWS // len(self.measuring))
        return {name: rows[:each] for name, rows in self.measuring.items()}


def open_clients(config: RunConfig) -> Clients:
    """Return the clients of a run, whose rows are all on this machine.

    Raises:
        NoDataError: no client holds enough rows out.
        FedLLMError: the data or the model cannot be used.
    """
    holder = PROCESS.open(config.to_flat(), {"server-paths": True})
    able = {name: client for name, client in holder.clients.items() if can_choose(client)}
    if not able:
        raise NoDataError(
            "no client holds out two different rows, of which one chooses and one measures; raise"
            " data.held-out-fraction or data.max-held-out"
        )
    halves = {name: split_held_out(client.held_out) for name, client in able.items()}
    choosing, measuring = ({name: pair[side] for name, pair in halves.items()} for side in (0, 1))
    return Clients(holder, choosing, measuring)


def losses(engine: Engine, vectors: Vectors, rows: Mapping[str, Rows]) -> dict[str, float]:
    """Return the loss of each client's adapter on its `rows`, in nats per learnt token."""
    jobs = [EvaluationJob(name, vectors[name], of_client) for name, of_client in rows.items()]
    return {answer.client_id: answer.loss for answer in engine.evaluate(jobs)}


def losses_on_others(clients: Clients, vectors: Vectors) -> dict[str, float]:
    """Return for each client how well its adapter does on the other clients' text: the mean over them.

    {} for a single client, which has no others.
    """
    owners = clients.sample
    if len(owners) < 2:
        return {}
    distinct = {id(vector): vector for vector in vectors.values()}
    jobs = [
        EvaluationJob(f"{key} {owner}", vector, rows)
        for key, vector in distinct.items()
        for owner, rows in owners.items()
    ]
    found = {answer.client_id: answer.loss for answer in clients.engine.evaluate(jobs)}
    return {
        name: fmean(found[f"{id(vectors[name])} {owner}"] for owner in owners if owner != name)
        for name in owners
    }


def finite_mean(values: Iterable[float]) -> float:
    """Return a mean, infinity where a value is not finite: such an adapter is never the best."""
    mean = fmean(values)
    return mean if math.isfinite(mean) else math.inf
