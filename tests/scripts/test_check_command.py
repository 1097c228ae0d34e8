"""What `fedllm check` says of a rule that is not what its keys say."""

import pytest

from fedllm.config.run_config import RunConfig
from scripts.commands.check_command import resolved_axes


@pytest.mark.parametrize(
    ("flat", "in_use"),
    [
        ({}, {}),
        ({"aggregation.read-out": "stack"}, {}),
        ({"aggregation.preset": "flexlora", "privacy.epsilon": 8.0}, {}),
        (
            {"aggregation.read-out": "svd", "privacy.epsilon": 8.0},
            {"aggregation.train": "b", "aggregation.read-out": "factor-mean"},
        ),
        (
            {"privacy.epsilon": 8.0, "privacy.unit": "client"},
            {
                "aggregation.train": "b",
                "aggregation.read-out": "factor-mean",
                "aggregation.weighting": "uniform",
            },
        ),
        ({"aggregation.preset": "fedex"}, {"aggregation.read-out": "residual"}),
    ],
)
def test_keys_whose_value_is_not_in_use(flat: dict[str, object], in_use: dict[str, str]) -> None:
    assert resolved_axes(RunConfig.from_flat(flat)) == in_use
