"""Whose adapters teach: the clients of a round, at most so many, the heaviest first.

Updates are added to the aggregate as they arrive and let go; those of teachers are kept until the step is
done, K x P float32 values. A late update does not teach: the adapter it was made from is gone.
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

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the adapter's values."""
        return hashlib.sha256(self.vector.float().contiguous().numpy().tobytes()).hexdigest()


@dataclass(eq=False)
class Teachers:
    """Collects the teachers of a round, which began with the adapter `start`; at most `most` are kept."""

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
            # min() gives the first of equals, and the last to come is the one to go: hence from the end.
            self.kept.remove(min(reversed(self.kept), key=lambda adapter: adapter.weight))

    def without(self, silenced: Collection[str]) -> tuple[ClientAdapter, ...]:
        """Return the teachers but those that a robust rule has silenced."""
        return tuple(adapter for adapter in self.kept if adapter.client_id not in silenced)


def priors_of(adapters: Collection[ClientAdapter]) -> torch.Tensor:
    """Return the teachers' shares [K] of their total weight, in float64; they add up to 1."""
    weights_K = torch.tensor([adapter.weight for adapter in adapters], dtype=torch.float64)
    return weights_K / weights_K.sum()
