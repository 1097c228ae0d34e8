"""What a run's card and result say of held-out losses: the same data holders under base and adapter."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedllm.adapters.layout import initial_adapter
from fedllm.config.run_config import RunConfig
from fedllm.models.base import describe_layout
from fedllm.models.files import resolve_model
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from strategies.publish import model_card, summary

BASE = {"anna": 4.0, "ben": 8.0}


@pytest.fixture
def end(make_config: Callable) -> Callable[..., tuple[str, Mapping[str, Any]]]:
    """Return a function (losses by round, adapter of the last record) -> the card, what the result says."""

    def do(losses: Mapping[int, Mapping[str, float]], adapter: str = "") -> tuple[str, Mapping[str, Any]]:
        config: RunConfig = make_config()
        state = ServerState(2, initial_adapter(describe_layout(config.model, config.lora), 0))
        digests = {0: "of the base", 1: "of round 1", 2: adapter or state.adapter.digest}
        records = tuple(
            RoundRecord(round_num=number, held_out=losses.get(number, {}), adapter=digest)
            for number, digest in digests.items()
        )
        state = ServerState(2, state.adapter, records=records)
        result = summary(state, Path("adapter"))
        files = resolve_model(config.model.name)
        return model_card(resolve(config), files, state), result["held_out"]  # type: ignore[return-value]

    return do


def test_losses_are_compared_on_clients_that_measured_both(end: Callable) -> None:
    card, held_out = end({0: BASE, 2: {"ben": 6.0, "cleo": 1.0}})
    assert "| mean of 1 data holders | 8.0000 | 6.0000 |" in card
    assert held_out["before"]["clients"] == {"ben": 8.0}
    assert held_out["after"]["clients"] == {"ben": 6.0}
    assert (held_out["before"]["mean"], held_out["after"]["mean"]) == (8.0, 6.0)


@pytest.mark.parametrize(
    ("losses", "adapter"),
    [
        ({0: BASE, 1: BASE}, ""),  # the last round was not measured
        ({1: BASE, 2: BASE}, ""),  # nor the base model
        ({0: BASE, 2: BASE}, "another"),  # the last losses are not those of the published adapter
        ({0: BASE, 2: {"cleo": 1.0}}, ""),  # nobody measured both
        ({}, ""),
    ],
)
def test_what_was_not_measured_is_not_compared(
    losses: Mapping[int, Mapping[str, float]], adapter: str, end: Callable
) -> None:
    card, held_out = end(losses, adapter)
    assert "Not measured." in card
    assert held_out == {}
