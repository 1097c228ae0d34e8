from collections.abc import Callable, Sequence

import pytest
import torch

from fedllm.attacks.token_scores import whole
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.messages import LocalTraining
from fedllm.models.base import BaseModel
from tests.builders import engine_on


@pytest.fixture(scope="session")
def make_engine(load_tiny: Callable[..., BaseModel]) -> Callable[..., Engine]:
    """Return a function (kind, dtype, **choices) -> an engine on a tiny base model."""
    return lambda kind="llama", dtype="float32", **choices: engine_on(load_tiny(kind, dtype), **choices)


@pytest.fixture(scope="session")
def make_exact_engine(load_tiny: Callable[..., BaseModel]) -> Callable[..., Engine]:
    """Return a function (rank, targets) -> an engine in float64 on a tiny base model."""

    def make(rank: int = 2, targets: str = "q_proj") -> Engine:
        return engine_on(load_tiny("llama", "float64"), rank, targets=targets)

    return make


@pytest.fixture(scope="session")
def overfitted() -> Callable[..., torch.Tensor]:
    """Return a function (engine, texts, steps) -> the adapter [P] of a client that saw little else."""

    def train(engine: Engine, texts: Sequence[Sequence[int]], steps: int = 60) -> torch.Tensor:
        rows = tuple(map(whole, texts))
        training = LocalTraining(
            steps=steps, batch_size=len(rows), learning_rate=0.02, weight_decay=0.0, clip_norm=1.0
        )
        generator = torch.Generator().manual_seed(0)
        start = 0.1 * torch.randn(engine.layout.size, generator=generator)
        (result,) = engine.train([Job("a", start, (rows,) * steps, training)])
        return start + result.delta

    return train
