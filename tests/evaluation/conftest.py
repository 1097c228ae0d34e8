from collections.abc import Callable

import pytest
import torch

from fedllm.engine.engine import Engine
from fedllm.evaluation.read_items import make_task
from fedllm.evaluation.task import Task
from fedllm.models.base import BaseModel
from tests.builders import engine_on


@pytest.fixture(scope="session")
def make_engine(load_tiny: Callable[..., BaseModel]) -> Callable[..., Engine]:
    """Return a function (kind, dtype, **choices) -> an engine on a tiny base model."""
    return lambda kind="llama", dtype="float64", **choices: engine_on(load_tiny(kind, dtype), **choices)


@pytest.fixture(scope="session")
def quiz() -> Task:
    """Six questions with two to four choices of different lengths."""
    rows = [
        {
            "question": f"What does function {place} return?",
            "choices": ["the sum", "a list of all its lines", "nothing", "ü or 한국어"][: 2 + place % 3],
            "answer": place % 2,
        }
        for place in range(6)
    ]
    return make_task("quiz", rows)


def adapters_of(engine: Engine, number: int) -> list[torch.Tensor]:
    """Return the base model, a vector of zeros, and random adapters after it."""
    draw = torch.Generator().manual_seed(3)
    drawn = [0.2 * torch.randn(engine.layout.size, generator=draw) for _ in range(number - 1)]
    return [torch.zeros(engine.layout.size), *drawn]
