import random
from collections.abc import Callable, Sequence

import pytest

from fedllm.config.keys import LoraConfig
from fedllm.engine.engine import Engine
from fedllm.models.base import BaseModel, layout_of


@pytest.fixture(scope="session")
def make_engine(load_tiny: Callable[..., BaseModel]) -> Callable[..., Engine]:
    """Return a function (kind, dtype, rank, token budget) -> an engine on a tiny base model."""

    def make(kind: str = "llama", dtype: str = "float32", rank: int = 8, token_budget: int = 512) -> Engine:
        base = load_tiny(kind, dtype)
        lora = LoraConfig(rank=rank, alpha=2.0 * rank, target_modules="all-linear")
        return Engine(base, layout_of(base.model, lora, base.fingerprint), token_budget=token_budget)

    return make


@pytest.fixture(scope="session")
def random_texts() -> Callable[..., list[tuple[int, ...]]]:
    """Return a function (lengths, seed) -> texts of random tokens."""

    def make(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
        generator = random.Random(seed)
        return [tuple(generator.randrange(5, 300) for _ in range(length)) for length in lengths]

    return make
