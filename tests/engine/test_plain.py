"""What the plain twin leaves behind."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedllm.engine.plain import train_plainly


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_plain_twin_leaves_the_base_as_it_was_when_it_fails(
    make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama")
    before = [name for name, _ in engine.base.model.named_modules()]
    broken = replace(make_job(engine.layout), correction=torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"size|shape"):
        train_plainly(engine.base, engine.layout, broken)
    assert [name for name, _ in engine.base.model.named_modules()] == before


@pytest.mark.gpu
def test_the_plain_twin_trains_where_its_base_model_is(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", device="cuda")
    plain = train_plainly(engine.base, engine.layout, make_job(engine.layout))
    assert plain.is_cuda
    assert float(plain.abs().max()) > 1e-4
