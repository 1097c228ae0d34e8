from collections.abc import Callable

import pytest

from fedllm.config import LoraConfig
from fedllm.models.base import BaseModel, layout_of
from fedllm.training.engine import Engine


@pytest.fixture(scope="session")
def make_engine(load_tiny: Callable[..., BaseModel]) -> Callable[..., Engine]:
    """Return a function (rank, targets) -> an engine in float64 on a tiny base model."""

    def make(rank: int = 2, targets: str = "q_proj") -> Engine:
        base = load_tiny("llama", "float64")
        lora = LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=targets)
        return Engine(base, layout_of(base.model, lora, base.fingerprint))

    return make
