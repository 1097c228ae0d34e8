"""What a process keeps in memory, and what makes it load anew."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.engine.resident import Resident
from fedllm.errors import LayoutError
from fedllm.models.base import layout_of
from fedllm.models.files import resolve_model


@pytest.fixture
def make_model(make_model_folder: Callable[..., Path]) -> Callable[..., ModelConfig]:
    return lambda seed=0: ModelConfig(name=str(make_model_folder(seed=seed)), device="cpu")


def test_resident_base_is_loaded_once(make_model: Callable[..., ModelConfig]) -> None:
    resident, model = Resident(), make_model()
    base = resident.base(model)
    assert resident.base(ModelConfig(name=model.name, device="auto")) is base
    assert resident.tokenizer(resolve_model(model.name)) is base.tokenizer
    assert Resident().base(model) is not base


def test_resident_engine_stands_for_one_layout(make_model: Callable[..., ModelConfig]) -> None:
    resident, model = Resident(), make_model()
    base = resident.base(model)
    layout = layout_of(base.model, LoraConfig(rank=2), base.fingerprint)
    engine = resident.engine(model, layout)
    assert engine.base is base
    assert resident.engine(model, layout_of(base.model, LoraConfig(rank=2), base.fingerprint)) is engine
    other = layout_of(base.model, LoraConfig(rank=3), base.fingerprint)
    assert resident.engine(model, other).layout == other


def test_resident_keeps_the_newest_model_alone(make_model: Callable[..., ModelConfig]) -> None:
    resident, first = Resident(), make_model(0)
    base = resident.base(first)
    layout = layout_of(base.model, LoraConfig(rank=2), base.fingerprint)
    with pytest.raises(LayoutError):
        resident.engine(make_model(1), layout)
    assert resident.base(first) is not base
