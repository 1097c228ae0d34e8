import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.layout import (
    AdapterLayout,
    AdapterState,
    LoraMatrix,
    initial_adapter,
    layout_from_dict,
)
from fedllm.errors import LayoutError, NonFiniteError

laws = settings(deadline=None, max_examples=40)
LAYOUT = AdapterLayout((LoraMatrix("a", 3, 5), LoraMatrix("b.c", 4, 2)), 2, 4.0, "f" * 64)


@st.composite
def layouts(draw: st.DrawFn) -> AdapterLayout:
    shapes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
    matrices = tuple(LoraMatrix(f"layer.{index}", *shape) for index, shape in enumerate(shapes))
    return AdapterLayout(matrices, draw(st.integers(1, 4)), draw(st.floats(0.5, 64)), "f" * 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 3},
        {"alpha": 4.5},
        {"fingerprint": "e" * 64},
        {"matrices": LAYOUT.matrices[::-1]},
        {"matrices": LAYOUT.matrices[:1]},
        {"matrices": (LoraMatrix("a2", 3, 5), LAYOUT.matrices[1])},
        {"matrices": (LoraMatrix("a", 5, 3), LAYOUT.matrices[1])},
    ],
)
def test_the_digest_changes_with_anything(changes: dict[str, Any]) -> None:
    assert replace(LAYOUT, **changes).digest != LAYOUT.digest
    assert replace(LAYOUT).digest == LAYOUT.digest


@laws
@given(layouts())
def test_a_layout_survives_json(layout: AdapterLayout) -> None:
    again = layout_from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert again.digest == layout.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"matrices": None},
        {"matrices": [{"module": "a"}]},
        {"matrices": [7]},
        {"matrices": []},
        {"rank": "two"},
        {"rank": None},
        {"rank": float("inf")},
        {"alpha": "x"},
        {"alpha": [1]},
    ],
)
def test_a_malformed_description_is_no_layout(changes: dict[str, Any]) -> None:
    with pytest.raises(LayoutError):
        layout_from_dict({**LAYOUT.to_dict(), **changes})
    for key in LAYOUT.to_dict():
        with pytest.raises(LayoutError):
            layout_from_dict({name: value for name, value in LAYOUT.to_dict().items() if name != key})


def test_a_layout_adapts_at_least_one_layer_and_none_twice() -> None:
    for matrices in ((), (LoraMatrix("a", 1, 1), LoraMatrix("a", 2, 2))):
        with pytest.raises(LayoutError):
            AdapterLayout(matrices, 1, 1.0, "")


@laws
@given(layouts())
def test_tensors_tile_the_vector_without_gap_or_overlap(layout: AdapterLayout) -> None:
    ends = [spec.offset + spec.size for spec in layout.tensors]
    assert [0, *ends[:-1]] == [spec.offset for spec in layout.tensors]
    assert layout.size == ends[-1]
    assert layout.size == layout.rank * sum(m.in_features + m.out_features for m in layout.matrices)
    assert layout.scale == layout.alpha / layout.rank


@laws
@given(layouts(), st.integers(0, 2**31))
def test_flatten_is_the_inverse_of_factors(layout: AdapterLayout, seed: int) -> None:
    vector = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    factors = layout.factors(vector)
    for (a_RD, b_DR), matrix in zip(factors, layout.matrices, strict=True):
        assert a_RD.shape == (layout.rank, matrix.in_features)
        assert b_DR.shape == (matrix.out_features, layout.rank)
    assert torch.equal(layout.flatten(factors), vector)
    doubled = [(a_RD.double(), b_DR.double()) for a_RD, b_DR in factors]
    assert torch.equal(layout.flatten(doubled), vector)


def test_factors_are_views_of_the_vector() -> None:
    vector = torch.zeros(LAYOUT.size)
    for number, pair in enumerate(LAYOUT.factors(vector), 1):
        for tensor in pair:
            tensor.fill_(number)
    assert vector.tolist() == [1.0] * 16 + [2.0] * 12


def test_tensors_bear_the_names_peft_gives_them() -> None:
    names = list(AdapterState(LAYOUT, torch.zeros(LAYOUT.size)).tensors())
    assert names[:2] == ["base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"]
    assert names[2:] == ["base_model.model.b.c.lora_A.weight", "base_model.model.b.c.lora_B.weight"]


@laws
@given(layouts(), st.integers(0, 2**31))
def test_the_initial_adapter_is_bounded_and_changes_nothing_yet(layout: AdapterLayout, seed: int) -> None:
    state = initial_adapter(layout, seed)
    for a_RD, b_DR in layout.factors(state.vector):
        assert float(a_RD.abs().max()) <= a_RD.shape[1] ** -0.5
        assert int(b_DR.count_nonzero()) == 0
    assert initial_adapter(layout, seed).digest == state.digest


def test_initial_adapters_fill_their_bounds_and_differ_by_seed() -> None:
    layout = AdapterLayout((LoraMatrix("a", 64, 8),), 16, 16.0, "f")
    (a_RD, _), *_ = layout.factors(initial_adapter(layout, 0).vector)
    assert float(a_RD.max()) > 0.95 / 8
    assert float(a_RD.min()) < -0.95 / 8
    assert abs(float(a_RD.mean())) < 0.01
    assert initial_adapter(layout, 0).digest != initial_adapter(layout, 1).digest


def test_equal_digests_mean_equal_bits() -> None:
    vector = torch.ones(LAYOUT.size)
    digest = AdapterState(LAYOUT, vector.clone()).digest
    assert AdapterState(LAYOUT, vector.clone()).digest == digest
    vector[-1] = torch.nextafter(vector[-1], torch.tensor(2.0))
    assert AdapterState(LAYOUT, vector).digest != digest
    assert AdapterState(replace(LAYOUT, alpha=5.0), torch.ones(LAYOUT.size)).digest != digest


@pytest.mark.parametrize(
    "vector",
    [
        torch.zeros(LAYOUT.size - 1),
        torch.zeros(LAYOUT.size, 1),
        torch.zeros(LAYOUT.size, dtype=torch.float64),
        torch.zeros(LAYOUT.size, dtype=torch.bfloat16),
    ],
)
def test_a_state_is_a_flat_float32_vector_of_the_layouts_size(vector: torch.Tensor) -> None:
    with pytest.raises(LayoutError):
        AdapterState(LAYOUT, vector)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(value: float) -> None:
    vector = torch.zeros(LAYOUT.size)
    assert AdapterState(LAYOUT, vector).checked_finite().vector is vector
    vector[-1] = value
    with pytest.raises(NonFiniteError):
        AdapterState(LAYOUT, vector).checked_finite()
