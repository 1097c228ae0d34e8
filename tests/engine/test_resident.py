"""What a process keeps in memory, and what makes it load anew."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.engine.engine import Engine
from fedllm.engine.resident import Resident
from fedllm.errors import LayoutError
from fedllm.models.base import ChosenModel, layout_of, load_chosen
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


def test_resident_lets_go_of_an_engine_before_the_next(
    make_model: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, model, still_there = Resident(), make_model(), []
    base = resident.base(model)
    layouts = [layout_of(base.model, LoraConfig(rank=rank), base.fingerprint) for rank in (2, 3)]
    old = weakref.ref(resident.engine(model, layouts[0]))

    def open_engine(*args: Any, **options: Any) -> Engine:
        gc.collect()
        still_there.append(old() is not None)
        return Engine(*args, **options)

    monkeypatch.setattr("fedllm.engine.resident.Engine", open_engine)
    resident.engine(model, layouts[1])
    assert still_there == [False]


def test_resident_keeps_the_newest_model_alone(make_model: Callable[..., ModelConfig]) -> None:
    resident, first = Resident(), make_model(0)
    base = resident.base(first)
    layout = layout_of(base.model, LoraConfig(rank=2), base.fingerprint)
    with pytest.raises(LayoutError):
        resident.engine(make_model(1), layout)
    assert resident.base(first) is not base


def test_resident_lets_go_of_a_model_before_the_next(
    make_model: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, first = Resident(), make_model(0)
    base = resident.base(first)
    resident.engine(first, layout_of(base.model, LoraConfig(rank=2), base.fingerprint))
    old, still_there = weakref.ref(base), []
    del base

    def load(chosen: ChosenModel, tokenizer: Any) -> Any:
        gc.collect()
        still_there.append(old() is not None)
        return load_chosen(chosen, tokenizer)

    monkeypatch.setattr("fedllm.engine.resident.load_chosen", load)
    resident.base(make_model(1))
    assert still_there == [False]
