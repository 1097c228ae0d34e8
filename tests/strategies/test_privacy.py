"""The real round under a privacy plan: noise, ledger, budget, refusals at work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedllm.privacy.ledger import Ledger
from strategies.rounds import next_round

CLIENT = {
    "privacy.epsilon": 50.0,
    "privacy.unit": "client",
    "privacy.noise-multiplier": 2.0,
    "privacy.clip": 0.5,
    "wire.codec": "fp32",
}
EXAMPLE = {"privacy.epsilon": 8.0, "privacy.noise-multiplier": 1.0, "wire.codec": "fp32"}


@pytest.mark.parametrize("flat", [CLIENT, EXAMPLE, {**CLIENT, "privacy.trust": "local"}])
def test_rounds_run(flat: dict[str, Any], make_config: Callable, open_run: Callable, tmp_path) -> None:
    run = open_run(make_config({**flat, "run.output": str(tmp_path)}))
    state = run.state
    for _ in range(2):
        state, record = next_round(run.session, state)
        print(record)
    assert record.epsilon and record.epsilon > 0
    assert state.ledger != Ledger()
    assert bool(torch.isfinite(state.adapter.vector).all())
