import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fedllm.attacks.token_scores import whole
from fedllm.config.keys import LoraConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.messages import LocalTraining
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import Encoded


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


@pytest.fixture(scope="session")
def overfitted() -> Callable[..., torch.Tensor]:
    """Return a function (engine, texts, steps) -> the adapter [P] of a client that saw little else."""

    def train(engine: Engine, texts: Sequence[Sequence[int]], steps: int = 60) -> torch.Tensor:
        rows: tuple[Encoded, ...] = tuple(map(whole, texts))
        training: Any = LocalTraining(
            steps=steps, batch_size=len(rows), learning_rate=0.02, weight_decay=0.0, clip_norm=1.0
        )
        generator = torch.Generator().manual_seed(0)
        start = 0.1 * torch.randn(engine.layout.size, generator=generator)
        (result,) = engine.train([Job("a", start, (rows,) * steps, training)])
        return start + result.delta

    return train


@pytest.fixture(scope="session")
def make_exact_engine(load_tiny: Callable[..., BaseModel]) -> Callable[..., Engine]:
    """Return a function (rank, targets) -> an engine in float64 on a tiny base model."""

    def make(rank: int = 2, targets: str = "q_proj") -> Engine:
        base = load_tiny("llama", "float64")
        lora = LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=targets)
        return Engine(base, layout_of(base.model, lora, base.fingerprint))

    return make
