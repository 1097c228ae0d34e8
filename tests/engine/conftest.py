import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.config.keys import LoraConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.messages import LocalTraining
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import IGNORED, Encoded

TRAINING = LocalTraining(steps=3, batch_size=3, learning_rate=1e-2, weight_decay=0.0, clip_norm=0.0)


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., tuple[Encoded, ...]]:
    """Return a function (lengths, seed) -> random rows whose first third is a prompt."""

    def make(lengths: Sequence[int], seed: int = 0) -> tuple[Encoded, ...]:
        generator = random.Random(seed)
        rows = []
        for length in lengths:
            tokens = tuple(generator.randrange(5, 300) for _ in range(length))
            cut = length // 3
            rows.append(Encoded(tokens, (IGNORED,) * cut + tokens[cut:]))
        return tuple(rows)

    return make


@pytest.fixture(scope="session")
def make_job(make_rows: Callable[..., tuple[Encoded, ...]]) -> Callable[..., Job]:
    """Return a function (layout, client id, seed, **numbers) -> a job from an adapter that already learnt."""

    def make(layout: AdapterLayout, client_id: str = "a", seed: int = 0, **numbers: Any) -> Job:
        training = LocalTraining(**{**vars(TRAINING), **numbers})
        lengths = random.Random(seed)
        batches = tuple(
            make_rows([lengths.randint(2, 24) for _ in range(training.batch_size)], seed=10 * seed + step)
            for step in range(training.steps)
        )
        start = 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
        return Job(client_id, start, batches, training)

    return make


@pytest.fixture(scope="session")
def make_engine(load_tiny: Callable[..., BaseModel]) -> Callable[..., Engine]:
    """Return a function (kind, dtype, targets, token budget, device) -> an engine on a tiny base model."""

    def make(
        kind: str = "llama",
        dtype: str = "float64",
        targets: str = "all-linear",
        token_budget: int = 512,
        device: str = "cpu",
    ) -> Engine:
        base = load_tiny(kind, dtype, device)
        lora = LoraConfig(rank=2, alpha=6.0, target_modules=targets)
        return Engine(base, layout_of(base.model, lora, base.fingerprint), token_budget=token_budget)

    return make
