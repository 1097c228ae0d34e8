"""What `fedllm check` says of keys that a preset, privacy or "auto" replaces."""

from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.plan.run_plan import resolve
from scripts.commands.check_command import replaced_values

ROWS = {"lora.init-a": "orthonormal", "privacy.trust": "local", "privacy.metrics": "held-out"}
CLIENTS = {"lora.init-a": "orthonormal", "privacy.trust": "central", "privacy.metrics": "withheld"}
FFA = {"aggregation.train": "b", "aggregation.read-out": "factor-mean"}


@pytest.mark.parametrize(
    ("flat", "in_use"),
    [
        ({"lora.init-a": "kaiming"}, {}),
        ({}, {"lora.init-a": "kaiming"}),
        ({"aggregation.read-out": "stack"}, {"lora.init-a": "kaiming"}),
        ({"aggregation.preset": "flexlora", "privacy.epsilon": 8.0}, ROWS),
        ({"aggregation.read-out": "svd", "privacy.epsilon": 8.0}, {**ROWS, **FFA}),
        (
            {"privacy.epsilon": 8.0, "privacy.unit": "client"},
            {**CLIENTS, **FFA, "aggregation.weighting": "uniform"},
        ),
        ({"aggregation.preset": "fedex"}, {"lora.init-a": "kaiming", "aggregation.read-out": "residual"}),
    ],
)
def test_replaced_values_are_shown(flat: dict[str, Any], in_use: dict[str, str]) -> None:
    assert replaced_values(resolve(RunConfig.from_flat(flat))) == in_use
