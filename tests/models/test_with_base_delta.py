"""A base model with a base delta added: the dense arithmetic, and the original bits afterwards."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm.adapters.base_delta import BaseDelta, no_base_delta
from fedllm.adapters.layout import AdapterLayout
from fedllm.config.keys import LoraConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import ModelError
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.files import fingerprint
from fedllm.models.with_base_delta import with_base_delta


def layout_on(base: BaseModel, rank: int = 2) -> AdapterLayout:
    return layout_of(base.model, LoraConfig(rank=rank, alpha=3.0 * rank), base.fingerprint)


def base_delta_on(layout: AdapterLayout, seed: int = 0, ranks: tuple[int, ...] = (3, 0, 1)) -> BaseDelta:
    """Return a base delta whose matrices differ in rank, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for place, matrix in enumerate(layout.matrices):
        rank = ranks[place % len(ranks)]
        b_ON = 0.1 * torch.randn(matrix.out_features, rank, generator=generator)
        pairs.append((b_ON, torch.randn(rank, matrix.in_features, generator=generator)))
    return BaseDelta(layout, tuple(pairs))


def weights_of(base: BaseModel, layout: AdapterLayout) -> list[torch.Tensor]:
    """Return copies of the adapted weights as [O, I], however the layer stores them."""
    weights = []
    for matrix in layout.matrices:
        weight: Any = base.model.get_submodule(matrix.module).weight.detach().clone()
        is_transposed = type(base.model.get_submodule(matrix.module)).__name__ == "Conv1D"
        weights.append(weight.T if is_transposed else weight)
    return weights


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_layer_gains_scale_times_b_a_and_loses_it_again(
    kind: str, dtype: str, load_tiny: Callable[..., BaseModel]
) -> None:
    base = load_tiny(kind, dtype)
    layout = layout_on(base)
    assert layout.scale == 3.0
    base_delta = base_delta_on(layout)
    state = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    places = [base.model.get_submodule(matrix.module).weight.data_ptr() for matrix in layout.matrices]
    before = weights_of(base, layout)
    with with_base_delta(base, base_delta):
        inside = weights_of(base, layout)
    for old, new, (b_ON, a_NI) in zip(before, inside, base_delta.factors, strict=True):
        exact = old.double() + 3.0 * (b_ON.double() @ a_NI.double())
        tolerance = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
        torch.testing.assert_close(new.double(), exact, rtol=tolerance, atol=tolerance)
        assert torch.equal(new, old) == (b_ON.shape[1] == 0)
        assert new.dtype == old.dtype
    after = base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert places == [base.model.get_submodule(m.module).weight.data_ptr() for m in layout.matrices]
    assert fingerprint(base.files.folder) == base.fingerprint


def test_base_delta_is_always_added_to_the_first_weights(
    load_tiny: Callable[..., BaseModel],
) -> None:
    """A thousand rounds leave no rounding: a machine that was there and one that was not have equal bits."""
    base = load_tiny("llama", "bfloat16")
    layout = layout_on(base)
    last = base_delta_on(layout, 9)
    with with_base_delta(base, last):
        expected = weights_of(base, layout)
    for seed in range(4):
        with with_base_delta(base, base_delta_on(layout, seed)):
            pass
    copied = BaseDelta(layout, tuple((b_ON.clone(), a_NI.clone()) for b_ON, a_NI in last.factors))
    with with_base_delta(base, copied):
        found = weights_of(base, layout)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_with_no_base_delta_nothing_is_touched(load_tiny: Callable[..., BaseModel]) -> None:
    base = load_tiny()
    layout = layout_on(base)
    base.sums.clear()
    with with_base_delta(base, no_base_delta(layout)):
        assert all(
            torch.equal(a, b) for a, b in zip(weights_of(base, layout), weights_of(base, layout), strict=True)
        )
    assert not base.sums


def test_the_originals_come_back_when_the_block_fails(load_tiny: Callable[..., BaseModel]) -> None:
    base = load_tiny()
    layout = layout_on(base)
    before = weights_of(base, layout)
    with pytest.raises(KeyError), with_base_delta(base, base_delta_on(layout)):
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(base, layout), strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_base_delta_of_an_adapters_factors_is_that_adapter(
    kind: str, load_tiny: Callable[..., BaseModel]
) -> None:
    """What the base gained as base delta, and what an adapter with the same factors computes, is one
    function."""
    base = load_tiny(kind, "float64")
    layout = layout_on(base)
    engine = Engine(base, layout, token_budget=512)
    vector = 0.3 * torch.randn(layout.size, generator=torch.Generator().manual_seed(3))
    base_delta = BaseDelta(layout, tuple((b_DR, a_RD) for a_RD, b_DR in layout.factors(vector)))
    from fedllm.models.chat import Encoded

    rows = (Encoded((5, 9, 33, 7), (-100, 9, 33, 7)), Encoded((8, 6, 12), (8, 6, 12)))
    (by_adapter,) = engine.evaluate([EvaluationJob("a", vector, rows)])
    (by_base,) = engine.evaluate([EvaluationJob("a", torch.zeros(layout.size), rows)])
    with with_base_delta(base, base_delta):
        (by_base_delta,) = engine.evaluate([EvaluationJob("a", torch.zeros(layout.size), rows)])
    assert by_base_delta.loss == pytest.approx(by_adapter.loss, rel=1e-9)
    assert abs(by_base.loss - by_adapter.loss) > 1e-3


def test_a_quantised_layer_is_refused_in_one_line(
    load_tiny: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_tiny()
    base_delta = base_delta_on(layout_on(base, rank=1))
    monkeypatch.setattr("fedllm.models.with_base_delta.plain_linear", lambda layer: None)
    with (
        pytest.raises(ModelError, match=r"quantised.*model\.quantization = none") as caught,
        with_base_delta(base, base_delta),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_base_delta_of_another_scale_adds_another_sum(load_tiny: Callable[..., BaseModel]) -> None:
    base = load_tiny()
    layout = layout_on(base)
    base_delta = base_delta_on(layout)
    with with_base_delta(base, base_delta):
        once = weights_of(base, layout)
    with with_base_delta(base, BaseDelta(replace(layout, alpha=2 * layout.alpha), base_delta.factors)):
        twice = weights_of(base, layout)
    before = weights_of(base, layout)
    for old, one, two in zip(before, once, twice, strict=True):
        torch.testing.assert_close(two - old, 2 * (one - old), rtol=1e-4, atol=1e-5)
