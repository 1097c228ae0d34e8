"""What several rooms of tests build: engines on tiny models, random texts."""

import random
from collections.abc import Sequence

from fedllm.config.keys import LoraConfig
from fedllm.engine.engine import Engine
from fedllm.models.base import BaseModel, layout_of


def engine_on(
    base: BaseModel,
    rank: int = 8,
    *,
    alpha: float | None = None,
    targets: str = "all-linear",
    budget: int = 512,
) -> Engine:
    """Return an engine for adapters of a rank on a base model; alpha is twice the rank unless given.

    `budget` is how many tokens one pass may hold.
    """
    lora = LoraConfig(rank=rank, alpha=2.0 * rank if alpha is None else alpha, target_modules=targets)
    return Engine(base, layout_of(base.model, lora, base.fingerprint), token_budget=budget)


def random_texts(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Return texts of random tokens, none of them special."""
    generator = random.Random(seed)
    return [tuple(generator.randrange(5, 300) for _ in range(length)) for length in lengths]
