"""Whose adapters teach: the clients of a round, at most so many, the heaviest first.

Updates are folded into the aggregate as they arrive and let go; those of teachers are kept until the step
is done, K x P float32 values. Others count in the aggregate as ever. A late update does not teach: the
adapter it was made from is gone.
Tensor suffixes: K teachers, P flat adapter.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from fedllm.adapters.layout import AdapterState, at_rank, with_rank
from fedllm.messages import ClientUpdate


@dataclass(frozen=True, eq=False)
class ClientAdapter:
    """What a client had after its training: its adapter [P] at the rank of the run, and its weight."""

    client_id: str
    weight: float
    vector: torch.Tensor


@dataclass(eq=False)
class Teachers:
    """The teachers of a round so far. `start` is the adapter its clients began with."""

    start: AdapterState
    round_num: int
    most: int
    kept: list[ClientAdapter] = field(default_factory=list)

    def add(self, update: ClientUpdate) -> None:
        """Take an accepted update in, and let the lightest go where there are too many.

        Of equal weights the one that came first stays, so a fixed order of arrival gives fixed teachers.
        """
        if update.round_num != self.round_num:
            return
        layout = self.start.layout
        own = at_rank(layout, update.rank)
        adapter_P = with_rank(self.start.vector, layout, update.rank) + update.delta
        self.kept.append(
            ClientAdapter(update.client_id, update.weight, with_rank(adapter_P, own, layout.rank))
        )
        if len(self.kept) > self.most:
            weights = [adapter.weight for adapter in reversed(self.kept)]
            self.kept.pop(len(weights) - 1 - weights.index(min(weights)))

    def without(self, silenced: Collection[str]) -> tuple[ClientAdapter, ...]:
        """Return the teachers but those whom the aggregation has silenced."""
        return tuple(adapter for adapter in self.kept if adapter.client_id not in silenced)


def priors_of(adapters: Collection[ClientAdapter]) -> torch.Tensor:
    """Return the teachers' shares [K] of their weight, in float64; they add up to 1."""
    weights_K = torch.tensor([adapter.weight for adapter in adapters], dtype=torch.float64)
    return weights_K / weights_K.sum()


def digest_of(adapter: ClientAdapter) -> str:
    """Return the SHA-256 (hex) of a teacher's values."""
    return hashlib.sha256(adapter.vector.float().contiguous().numpy().tobytes()).hexdigest()
