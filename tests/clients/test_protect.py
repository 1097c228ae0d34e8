import math
from typing import Any

import pytest
import torch

from clients.protect import Protection, protect
from fedllm.adapters.layout import AdapterLayout, LoraMatrix
from fedllm.engine.jobs import Result
from fedllm.errors import ConfigError, NonFiniteError
from fedllm.messages import ClientUpdate
from fedllm.models.chat import Encoded

LAYOUT = AdapterLayout((LoraMatrix("a", 1, 1),), 2, 4.0, "f" * 64)
ROWS = (
    Encoded((5, 6, 7, 8), (-100, -100, 7, 8), num_cut=0),
    Encoded((5, 6, 7), (5, 6, 7), num_cut=4),  # the first token has no prediction
    Encoded((9, 9, 9), (-100, 9, 9), num_cut=1),
)


def result(**changes: Any) -> Result:
    values = {
        "client_id": "anna",
        "delta": torch.tensor([0.5, -1.0], dtype=torch.float64),
        "loss": 0.75,
        "num_rows": 3,
        "num_tokens": 10,
        "seconds": 1.23456,
    }
    return Result(**{**values, **changes})


def protected(weighting: str = "examples", **changes: Any) -> ClientUpdate:
    plain = Protection(layout=LAYOUT, part="both", weighting=weighting, with_numbers=True)
    return protect(result(**changes), ROWS, 21, 4, plain)


@pytest.mark.parametrize(("weighting", "expected"), [("examples", 21.0), ("tokens", 6.0), ("uniform", 1.0)])
def test_a_client_weighs_its_rows_its_learnt_tokens_or_one(weighting: str, expected: float) -> None:
    assert protected(weighting).weight == expected


def test_an_update_is_a_delta_a_weight_and_counts() -> None:
    update = protected()
    assert (update.client_id, update.round_num, update.train_loss) == ("anna", 4, 0.75)
    assert (update.num_tokens, update.num_truncated, update.seconds) == (10, 2, 1.235)
    assert update.delta.dtype == torch.float32
    assert update.delta.tolist() == [0.5, -1.0]
    assert vars(update).keys() == {
        "client_id",
        "round_num",
        "rank",
        "delta",
        "weight",
        "num_tokens",
        "train_loss",
        "num_truncated",
        "seconds",
        "members",
        "control_delta",
        "held_out",
    }
    assert update.members == ()
    assert update.control_delta is None


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": math.nan},
        {"loss": math.inf},
        {"delta": torch.tensor([0.5, math.nan])},
        {"delta": torch.tensor([-math.inf, 0.5])},
    ],
)
def test_a_diverged_result_is_never_sent(changes: dict[str, Any]) -> None:
    with pytest.raises(NonFiniteError, match=r"client anna: .*lower train\.learning-rate"):
        protected(**changes)


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of examples, tokens, uniform"):
        protected("loss")
