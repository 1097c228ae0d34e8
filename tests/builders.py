"""What several rooms of tests build: engines on tiny models, texts, updates, requests to a data holder."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from clients.data_holder import DataHolder
from fedllm.adapters.base_delta import no_base_delta
from fedllm.adapters.layout import AdapterLayout, LoraMatrix, initial_adapter
from fedllm.config.keys import LoraConfig
from fedllm.engine.engine import Engine
from fedllm.messages import ClientUpdate, EvaluateRequest, TrainRequest
from fedllm.models.base import BaseModel, layout_of


@dataclass
class Clock:
    """Time that passes only where somebody sleeps; `asked` is for what a test wants to note of it."""

    now: float = 0.0
    asked: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        """Return the seconds that have passed."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


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


def small_layout(rank: int = 2) -> AdapterLayout:
    """Return a layout of two matrices, 14 values a rank, that no model has."""
    return AdapterLayout((LoraMatrix("a", 3, 5), LoraMatrix("b.c", 4, 2)), rank, 2.0 * rank, "f" * 64)


def client_update(client_id: str, delta: torch.Tensor, **changes: Any) -> ClientUpdate:
    """Return an update of round 4 at rank 2, with numbers that a wire must carry unchanged."""
    values: dict[str, Any] = {
        "round_num": 4,
        "rank": 2,
        "weight": 7.0,
        "num_tokens": 31,
        "train_loss": 0.25,
        "num_truncated": 1,
        "seconds": 0.5,
    }
    return ClientUpdate(client_id=client_id, delta=delta, **{**values, **changes})


def random_texts(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Return texts of random tokens, none of them special."""
    generator = random.Random(seed)
    return [tuple(generator.randrange(5, 300) for _ in range(length)) for length in lengths]


def train_request(holder: DataHolder, *client_ids: str, **changes: Any) -> TrainRequest:
    """Return a request for the first round of some clients, from an adapter of seed 0."""
    layout = holder.engine.layout
    values: dict[str, Any] = {
        "round_num": 1,
        "drawn": dict.fromkeys(client_ids, 0),
        "ranks": dict.fromkeys(client_ids, layout.rank),
        "adapter": initial_adapter(layout, 0),
        "base_delta": no_base_delta(layout),
        "plan_digest": holder.plan.digest,
    }
    return TrainRequest(**{**values, **changes})


def evaluate_request(holder: DataHolder, *client_ids: str, **changes: Any) -> EvaluateRequest:
    """Return a request for the held-out losses of some clients, of an adapter of seed 0."""
    layout = holder.engine.layout
    values: dict[str, Any] = {
        "round_num": 1,
        "drawn": dict.fromkeys(client_ids, 0),
        "adapter": initial_adapter(layout, 0),
        "base_delta": no_base_delta(layout),
        "plan_digest": holder.plan.digest,
    }
    return EvaluateRequest(**{**values, **changes})


_COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for name, arguments in json.loads(sys.argv[2]).items():
    *inner, name = name.split(".")
    kernel = getattr(importlib.import_module(".".join([sys.argv[1], *inner])), name)
    types = {key: value if isinstance(value, str) else "constexpr" for key, value in arguments.items()}
    sizes = {(kernel.arg_names.index(k),): v for k, v in arguments.items() if not isinstance(v, str)}
    triton.compile(ASTSource(fn=kernel, signature=types, constexprs=sizes), target=GPUTarget("cuda", 90, 32))
"""


def compile_kernels(module: str, kernels: Mapping[str, Mapping[str, str | int]]) -> None:
    """Compile Triton kernels for an H100, which takes no GPU; the interpreter accepts more than a compiler.

    Of each kernel every argument has its type ("*fp32", "i32"), or its value where it is a constant. A kernel
    of a package has its module's name before its own ("adamw._adamw_kernel").
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILE, module, json.dumps(kernels)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
