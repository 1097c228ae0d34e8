"""Weights laid end to end are those that were there, and one product computes them all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from fedllm.adapters.base_delta import BaseDelta
from fedllm.config.keys import LoraConfig
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.side_by_side import joined, joined_linear, lay_side_by_side, room_like
from fedllm.models.with_base_delta import with_base_delta


@pytest.mark.parametrize("has_bias", [True, False])
def test_layers_side_by_side_are_one_product(has_bias: bool) -> None:
    layers = [nn.Linear(6, size, bias=has_bias).requires_grad_(False) for size in (4, 2, 3)]
    x = torch.randn(5, 6)
    before = [layer(x) for layer in layers]
    assert joined_linear(layers) is None
    lay_side_by_side(layers)
    whole = joined_linear(layers)
    assert whole is not None
    for layer, output in zip(layers, before, strict=True):
        assert torch.equal(layer(x), output)
    torch.testing.assert_close(linear(x, whole.weight_OI, whole.bias_O), torch.cat(before, dim=1))


def test_layers_side_by_side_hold_nothing_twice() -> None:
    layers = [nn.Linear(6, size).requires_grad_(False) for size in (4, 2)]
    lay_side_by_side(layers)
    whole = joined_linear(layers)
    assert whole is not None
    assert whole.weight_OI.untyped_storage().nbytes() == 6 * 6 * 4
    layers[1].weight[0, 0] = 7.0
    assert float(whole.weight_OI[4, 0]) == 7.0


def test_layers_side_by_side_are_saved_as_they_are(tmp_path: Path) -> None:
    layers = nn.ModuleList(nn.Linear(6, size) for size in (4, 2))
    lay_side_by_side(list(layers))
    save_file(layers.state_dict(), tmp_path / "layers.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "layers.safetensors"), dict(layers.state_dict()))


def test_only_what_lies_end_to_end_is_joined() -> None:
    whole = torch.arange(12.0).view(6, 2)
    assert torch.equal(joined([whole[:2], whole[2:5]]), whole[:5])  # type: ignore[arg-type]
    assert joined([whole[:2], whole[3:]]) is None
    assert joined([whole[2:], whole[:2]]) is None
    assert joined([whole[:2], whole[2:5].clone()]) is None


def test_room_lies_end_to_end_where_its_models_do() -> None:
    whole, apart = torch.zeros(6, 2), torch.zeros(3, 2)
    rooms = room_like([whole[:4], whole[4:], apart])
    assert [tuple(room.shape) for room in rooms] == [(4, 2), (2, 2), (3, 2)]
    assert joined(rooms[:2]) is not None
    assert joined(rooms) is None


def test_base_delta_keeps_layers_side_by_side(load_tiny: Callable[..., BaseModel]) -> None:
    base = replace(load_tiny("llama"), sums={})
    layout = layout_of(base.model, LoraConfig(rank=2, alpha=6.0), base.fingerprint)
    ones = [(torch.ones(each.out_features, 1), torch.ones(1, each.in_features)) for each in layout.matrices]
    attention = base.model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    lay_side_by_side(layers)
    before = attention.k_proj.weight.clone()
    with with_base_delta(base, BaseDelta(layout, tuple(ones))):
        assert joined_linear(layers) is not None
        assert torch.equal(attention.k_proj.weight, before + layout.scale)
    assert torch.equal(attention.k_proj.weight, before)
    assert joined_linear(layers) is not None
