"""A technique at the client: what it does in a round, as a fixed set of steps that default to nothing.

A round calls the steps of every technique of the run in turn (`clients.techniques`), so a new technique is
one file and one line in that list. Steps see all clients of a node at once, because the engine trains them
fused.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from clients.data_holder import DataHolder
from clients.tokens import ClientTokens
from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob, Job, Result
from fedllm.errors import FedLLMError
from fedllm.messages import ClientEvaluation, ClientFailure, ClientUpdate, LocalTraining, TrainRequest

_logger = logging.getLogger("fedllm.clients")

Vectors: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class NodeRound:
    """A train request at the node that received it, and what the node's own plan says of that round.

    `trained` is the part of the adapter that clients train, `returned` the part of their delta that leaves.
    `labels` has, by client, the label of the secret sum that its update goes into.
    """

    holder: DataHolder
    request: TrainRequest
    techniques: "tuple[Technique, ...]"
    training: LocalTraining
    trained: str
    returned: str
    weighting: str
    labels: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def layout(self) -> AdapterLayout:
        """The layout of the run's adapter."""
        return self.request.adapter.layout

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.holder.plan.config.seed


@dataclass(frozen=True, eq=False)
class ClientWork:
    """One client in a round: its job, then what became of it.

    `start_P` is the adapter the client starts from, at the run's rank; `kept` are the vectors it kept after
    its last round, empty before its first; `keeps` those it will keep after this one. `result` is there once
    it has trained, `update` once it is protected.
    """

    client: ClientTokens
    num_drawn: int
    start_P: torch.Tensor
    kept: Vectors
    job: Job
    result: Result | None = None
    update: ClientUpdate | None = None
    keeps: Vectors = field(default_factory=dict)

    @property
    def trained(self) -> Result:
        """What training gave."""
        assert self.result is not None, "this client has not trained yet"
        return self.result

    @property
    def sent(self) -> ClientUpdate:
        """What leaves the client."""
        assert self.update is not None, "this client's result is not protected yet"
        return self.update

    def sending(self, **changes: Any) -> "ClientWork":
        """Return this work with fields of its update changed; without a privacy plan only."""
        return replace(self, update=replace(self.sent, **changes))

    def keeping(self, name: str, vector: torch.Tensor) -> "ClientWork":
        """Return this work with one more vector to keep."""
        return replace(self, keeps={**self.keeps, name: vector})


Works: TypeAlias = Sequence[ClientWork]
Evaluations: TypeAlias = Mapping[str, ClientEvaluation]


@dataclass(frozen=True, kw_only=True)
class Technique:
    """What one technique does with the clients of a node; every step left out does nothing.

    `kept` has the name and the size of each vector that a client keeps for it between rounds; a vector is in
    `ClientWork.kept` from a client's second round on.

    refuse    returns those of the named clients that must not train; nothing is counted yet
    start     the adapter [P] a client starts from, given the server's and what the client kept
    prepare   changes jobs before the engine trains them
    after     sees results and protected updates, inside the chain of `clients.protect`; without a privacy
              plan it may change an update, and always what the client keeps
    charge    counts what answers give away, when they are ready to leave; returns those that must stay
    measure   adds to the evaluations of the shared adapter, by client id
    """

    name: str
    kept: Mapping[str, int] = field(default_factory=dict)
    is_evaluated: bool = False  # whether `start` or `measure` does something, so evaluation loads `kept`
    refuse: Callable[[NodeRound, Sequence[str]], Mapping[str, ClientFailure]] = lambda this_round, names: {}
    start: Callable[[torch.Tensor, Vectors], torch.Tensor] = lambda start_P, kept: start_P
    prepare: Callable[[NodeRound, Works], Works] = lambda this_round, works: works
    after: Callable[[NodeRound, Works], Works] = lambda this_round, works: works
    charge: Callable[[NodeRound, Works], Mapping[str, ClientFailure]] = lambda this_round, works: {}
    measure: Callable[[Engine, Sequence[EvaluationJob], Mapping[str, Vectors], Evaluations], Evaluations] = (
        lambda engine, jobs, kept, measured: measured
    )


def start_of(techniques: Sequence[Technique], shared_P: torch.Tensor, kept: Vectors) -> torch.Tensor:
    """Return the adapter [P] a client starts from, `shared_P` being the server's."""
    for technique in techniques:
        shared_P = technique.start(shared_P, kept)
    return shared_P


def failure_of(client_id: str, error: FedLLMError) -> ClientFailure:
    """Return the answer of a client that has no result; why is logged here, and only the code leaves."""
    _logger.error("%s: %s", error.code, error)
    return ClientFailure(client_id=client_id, code=error.code)
