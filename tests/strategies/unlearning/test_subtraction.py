"""Subtraction is the arithmetic of a mean without one of its members, and exact where nothing was missed."""

from dataclasses import replace

import pytest
import torch

from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.errors import ConfigError
from fedllm.runs.checkpoint import ServerState
from strategies.unlearning.subtraction import Turn, subtract
from tests.builders import small_layout

LAYOUT = small_layout(rank=4)  # enough that no mean of these loses anything to the rank
START = initial_adapter(LAYOUT, 0)


def change(seed: int) -> torch.Tensor:
    """Return a client's change of B alone: then the mean of products is the product of the mean."""
    delta = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed))
    for a, _ in LAYOUT.factors(delta):
        a.zero_()
    return delta


def state_after(round_num: int, *steps: torch.Tensor) -> ServerState:
    return ServerState(round_num, AdapterState(LAYOUT, START.vector + sum(steps)))


def products(adapter: AdapterState) -> list[torch.Tensor]:
    return [b.double() @ a.double() for a, b in adapter.layout.factors(adapter.vector)]


def test_a_round_without_a_client_is_the_mean_of_the_others() -> None:
    ben, cleo, dora = change(1), change(2), change(3)
    before, after = state_after(0), state_after(1, 0.2 * ben + 0.5 * cleo + 0.3 * dora)
    found = subtract(after, [Turn(0.2, ben, before, after)])
    wanted = state_after(1, (0.5 * cleo + 0.3 * dora) / 0.8).adapter
    for got, expected in zip(products(found), products(wanted), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_rounds_between_two_kept_states_share_their_change() -> None:
    ben, cleo = change(1), change(2)
    mean = (ben + cleo) / 2
    before, after = state_after(2), state_after(4, mean, mean)  # the same in both rounds
    turn = Turn(0.5, ben, before, after)
    for got, expected in zip(
        products(subtract(after, [turn, turn])), products(state_after(4, cleo, cleo).adapter), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_without_turns_an_adapter_computes_what_it_did() -> None:
    state = state_after(3, change(1))
    for got, expected in zip(products(subtract(state, [])), products(state.adapter), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_what_the_base_model_gained_is_counted_once() -> None:
    ben, cleo = change(1), change(2)
    pairs = tuple((torch.ones(m.out_features, 1), torch.ones(1, m.in_features)) for m in LAYOUT.matrices)
    base_delta = replace(state_after(0).base_delta, factors=pairs)
    before = state_after(0)
    after = replace(state_after(1, (ben + cleo) / 2), base_delta=base_delta)
    found = subtract(after, [Turn(0.5, ben, before, after)])
    # The round moved the products by the mean of both and by the base delta; half of that was not ben's.
    for index, got in enumerate(products(found)):
        alone = products(state_after(1, cleo).adapter)[index]
        added = pairs[index][0].double() @ pairs[index][1].double()
        torch.testing.assert_close(got, alone + added, atol=1e-4, rtol=1e-4)


def test_a_client_alone_in_a_round_cannot_be_subtracted() -> None:
    before, after = state_after(0), state_after(1, change(1))
    with pytest.raises(ConfigError, match="use ascent"):
        subtract(after, [Turn(1.0, change(1), before, after)])
