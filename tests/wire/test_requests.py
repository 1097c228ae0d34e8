"""Requests: what a server asks of a node comes back as it was, or is refused by field."""

import math
from typing import Any

import pytest
import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.errors import LayoutError, NonFiniteError, WireError
from fedllm.types import EvaluateRequest, LocalTraining, TrainRequest
from fedllm.wire import records

LAYOUT = AdapterLayout((LoraMatrix("a", 3, 5), LoraMatrix("b.c", 4, 2)), 2, 4.0, "f" * 64)
TRAINING = LocalTraining(
    steps=2,
    batch_size=3,
    learning_rate=0.5,
    weight_decay=0.0,
    clip_norm=1.0,
    proximal=0.25,
    proximal_space="product",
)


def train_request(**changes: Any) -> TrainRequest:
    values: dict[str, Any] = {
        "round_num": 4,
        "client_ids": ("a", "b"),
        "num_drawn": (0, 12),
        "adapter": initial_adapter(LAYOUT, 0),
        "training": TRAINING,
        "codec": "int8",
        "weighting": "tokens",
        "seed": 2**63 - 1,
    }
    return TrainRequest(**{**values, **changes})


def test_a_train_request_comes_back_as_it_was() -> None:
    sent = train_request()
    content = records.write_train_request(sent)
    assert records.is_fedllm_request(content)
    got = records.read_train_request(content, LAYOUT)
    assert got.adapter.digest == sent.adapter.digest
    for name in ("round_num", "client_ids", "num_drawn", "training", "codec", "weighting", "seed"):
        assert getattr(got, name) == getattr(sent, name)


def test_control_variates_travel_with_a_train_request_that_has_them() -> None:
    control = initial_adapter(LAYOUT, 1)
    content = records.write_train_request(train_request(control=control))
    got = records.read_train_request(content, LAYOUT)
    assert got.control is not None
    assert got.control.digest == control.digest
    assert got.adapter.digest == initial_adapter(LAYOUT, 0).digest
    assert records.read_train_request(records.write_train_request(train_request()), LAYOUT).control is None
    content["control"]["second"] = content["control"]["adapter"]
    with pytest.raises(WireError, match="exactly one"):
        records.read_train_request(content, LAYOUT)


def test_an_evaluate_request_comes_back_as_it_was() -> None:
    adapter = initial_adapter(LAYOUT, 0)
    sent = EvaluateRequest(round_num=0, client_ids=("a",), num_drawn=(12,), adapter=adapter)
    content = records.write_evaluate_request(sent)
    assert records.is_fedllm_request(content)
    got = records.read_evaluate_request(content, LAYOUT)
    assert (got.round_num, got.client_ids, got.num_drawn) == (0, ("a",), (12,))
    assert got.adapter.digest == adapter.digest


@pytest.mark.parametrize("key", list(records.write_train_request(train_request())["request"]))
@pytest.mark.parametrize("value", [None, "text", 1.5, True, [1.5], []])
def test_a_train_request_with_a_missing_or_mistyped_field_is_refused(key: str, value: Any) -> None:
    content = records.write_train_request(train_request())
    before = content["request"].pop(key)
    if type(value) is type(before) and not isinstance(value, list):
        value = None
    if value is not None:
        content["request"][key] = value
    with pytest.raises(WireError, match=key):
        records.read_train_request(content, LAYOUT)


def test_a_request_whose_adapter_is_not_this_runs_is_refused() -> None:
    content = records.write_train_request(train_request())
    other = AdapterLayout(LAYOUT.matrices, 2, 8.0, LAYOUT.fingerprint)
    with pytest.raises(WireError):
        records.read_train_request(content, other)
    content["request"]["round"] = 5
    with pytest.raises(WireError, match="round 4"):
        records.read_train_request(content, LAYOUT)
    content["request"]["round"] = 4
    content["adapter"]["second"] = content["adapter"]["adapter"]
    with pytest.raises(WireError, match="exactly one"):
        records.read_train_request(content, LAYOUT)


def test_a_request_whose_adapter_is_not_finite_is_refused() -> None:
    state = AdapterState(LAYOUT, torch.full((LAYOUT.size,), math.nan))
    with pytest.raises(NonFiniteError):
        records.read_train_request(records.write_train_request(train_request(adapter=state)), LAYOUT)


def test_a_request_with_an_unknown_proximal_space_is_refused() -> None:
    content = records.write_train_request(train_request())
    content["request"]["train.proximal_space"] = "logits"
    with pytest.raises(LayoutError, match="one of factor, product"):
        records.read_train_request(content, LAYOUT)


@pytest.mark.parametrize("changes", [{"num_drawn": (0,)}, {"client_ids": ("a", "a")}])
def test_a_request_names_each_client_once_with_what_it_has_drawn(changes: dict[str, Any]) -> None:
    with pytest.raises(LayoutError):
        train_request(**changes)


def test_an_evaluate_request_gives_what_each_client_has_drawn() -> None:
    adapter = initial_adapter(LAYOUT, 0)
    with pytest.raises(LayoutError):
        EvaluateRequest(round_num=0, client_ids=("a", "b"), num_drawn=(12,), adapter=adapter)
