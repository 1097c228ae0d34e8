import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch

from fedllm.config.keys import LoraConfig
from fedllm.distillation.teacher import Teacher
from fedllm.engine.engine import Engine
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import IGNORED, Encoded


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., tuple[Encoded, ...]]:
    """Return a function (lengths, seed, context) -> random rows; a share `context` of each is not learnt."""

    def make(lengths: Sequence[int], seed: int = 0, context: float = 0.0) -> tuple[Encoded, ...]:
        generator = random.Random(seed)
        rows = []
        for length in lengths:
            tokens = tuple(generator.randrange(5, 300) for _ in range(length))
            cut = int(length * context)
            rows.append(Encoded(tokens, (IGNORED,) * cut + tokens[cut:]))
        return tuple(rows)

    return make


@pytest.fixture(scope="session")
def make_engine(load_tiny: Callable[..., BaseModel]) -> Callable[..., Engine]:
    """Return a function (kind, dtype) -> an engine on a tiny base model that is sure of what it says.

    Untrained, a tiny model's predictions are all but even; larger embeddings make them sharp.
    """

    @cache
    def sharp(kind: str, dtype: str) -> BaseModel:
        base = load_tiny(kind, dtype)
        model = deepcopy(base.model)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20.0)
        return replace(base, model=model)

    def make(kind: str = "llama", dtype: str = "float64") -> Engine:
        base = sharp(kind, dtype)
        lora = LoraConfig(rank=2, alpha=6.0)
        return Engine(base, layout_of(base.model, lora, base.fingerprint), token_budget=512)

    return make


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., Teacher]:
    """Return a function (engine, number, scale, **choices) -> random adapters with priors 1, 2, ..."""

    def make(engine: Engine, number: int = 3, scale: float = 0.6, **choices: object) -> Teacher:
        vectors = [
            scale * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(seed))
            for seed in range(number)
        ]
        priors = torch.arange(1.0, number + 1)
        return Teacher(tuple(vectors), engine.layout, priors, **choices)  # type: ignore[arg-type]

    return make
