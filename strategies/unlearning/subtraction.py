"""Unlearning by subtraction: a client's share of every round, taken out of the finished adapter (class D).

In a round the mean of the clients' products moved by D, of which the share p came from the client's own
change C. Without it the mean would have moved by (D - p C) / (1 - p), so the finished product gains

    w (D - C),   w = p / (1 - p)

for every turn of the client. Nobody keeps C: the client does the turn again from a kept checkpoint, on the
same rows, in the same steps. D is the change between two kept checkpoints, taken as even over the rounds
between. Where all rounds are kept both are exact, and a run of one round is unlearnt exactly. Otherwise what
stays is of second order: the others began their later rounds from an adapter that had learnt from the client.
Tensor suffixes: P flat adapter, R rank, O output, I input feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.algebra import Product, truncate
from fedllm.adapters.layout import AdapterState
from fedllm.errors import ConfigError
from fedllm.runs.checkpoint import ServerState


@dataclass(frozen=True, eq=False)
class Turn:
    """One round of the client: its share of the weights, and its change `delta` [P] from the state `before`.

    `after` is the next state that is kept.
    """

    share: float
    delta: torch.Tensor
    before: ServerState
    after: ServerState


def subtract(state: ServerState, turns: Sequence[Turn]) -> AdapterState:
    """Return the adapter of `state` without a client's `turns`, at the rank it has.

    What the run has added to the base model stays; its share is taken out of the adapter too.

    Raises:
        ConfigError: the client was alone in a round, so there is nothing to put in the place of its share.
    """
    if any(turn.share >= 1 for turn in turns):
        raise ConfigError("subtraction needs other clients in every round of the one to forget; use ascent")
    layout = state.adapter.layout
    factors = []
    for index, (a_RI, _) in enumerate(layout.factors(state.adapter.vector)):
        total_OI = _product(state, index)
        for turn in turns:
            rounds = turn.after.round_num - turn.before.round_num
            moved_OI = (_product(turn.after, index) - _product(turn.before, index)) / rounds
            total_OI += turn.share / (1 - turn.share) * (moved_OI - _change(turn, index))
        total_OI -= _of_base_delta(state, index)
        read = truncate(Product(total_OI[None]), layout.rank, a_RI[None])
        factors.append((read.a_LRI[0].float(), read.b_LOR[0].float()))
    return AdapterState(layout, layout.flatten(factors))


def _product(state: ServerState, index: int) -> torch.Tensor:
    """Return what a state has added to one matrix of the base model, [O, I] before the layout's scale."""
    a_RI, b_OR = state.adapter.layout.factors(state.adapter.vector)[index]
    return b_OR.double() @ a_RI.double() + _of_base_delta(state, index)


def _of_base_delta(state: ServerState, index: int) -> torch.Tensor:
    b_ON, a_NI = state.base_delta.factors[index]
    return b_ON.double() @ a_NI.double()


def _change(turn: Turn, index: int) -> torch.Tensor:
    """Return how the client moved one product in its turn, [O, I]."""
    layout, start_P = turn.before.adapter.layout, turn.before.adapter.vector
    (a_RI, b_OR), (after_RI, after_OR) = (
        layout.factors(vector_P)[index] for vector_P in (start_P.double(), start_P.double() + turn.delta)
    )
    return after_OR @ after_RI - b_OR @ a_RI
