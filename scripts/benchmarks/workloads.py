"""What `scripts/benchmarks/client.py` trains on: one client's rows in a round, as text and as the engine's
job.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedllm.adapters.layout import AdapterLayout, initial_adapter
from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.data.fields import Example
from fedllm.data.shards import draw_rows
from fedllm.engine.engine import Engine
from fedllm.engine.flat_row import lay_out
from fedllm.engine.jobs import Job
from fedllm.messages import LocalTraining
from fedllm.models.base import choose_device, layout_of, load_base
from fedllm.models.chat import IGNORED, Encoded, encode
from fedllm.seeds import derive_seed
from scripts.benchmarks.arithmetic import useful_flop

LORA = LoraConfig(rank=8, alpha=16.0, target_modules="q_proj,v_proj")


@dataclass(frozen=True)
class Shape:
    """How much one client trains in a round."""

    training: LocalTraining
    max_length: int  # tokens of a row


_NUMBERS: Any = {"learning_rate": 1e-3, "weight_decay": 0.0, "clip_norm": 1.0}
SHORT = Shape(LocalTraining(steps=4, batch_size=4, **_NUMBERS), 128)
UNEVEN = Shape(LocalTraining(steps=1, batch_size=16, **_NUMBERS), 512)


@dataclass(frozen=True, eq=False)
class Workload:
    """One client's work in a round, as text and as the engine's job."""

    examples: tuple[Example, ...]
    job: Job
    layout: AdapterLayout
    max_length: int

    @property
    def rows(self) -> list[Encoded]:
        """The examples as tokens, in the order they are trained on."""
        return [row for batch in self.job.batches for row in batch]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def num_learnt(self) -> int:
        """Tokens whose prediction is learnt."""
        return sum(row.num_supervised for row in self.rows)

    @property
    def num_slots(self) -> int:
        """Tokens of all rows where every batch is padded to its longest."""
        return sum(len(batch) * max(len(row.tokens) for row in batch) for batch in self.job.batches)


@dataclass(frozen=True, eq=False)
class Bench:
    """What every client shares: the resident engine, where the base model lies, and the round's numbers."""

    engine: Engine
    folder: Path
    client_id: str
    seed: int

    @property
    def model(self) -> Any:
        """The resident base model."""
        return self.engine.base.model


def open_bench(client_id: str, seed: int, device: str = "cpu") -> Bench:
    """Load the base model and build the engine, once, as a client process does.

    On a CPU it is float32, as all peers are there.
    """
    dtype = "float32" if choose_device(device).type == "cpu" else "auto"
    base = load_base(ModelConfig(name="smollm2-135m-instruct", device=device, dtype=dtype))
    engine = Engine(base, layout_of(base.model, LORA, base.fingerprint))
    return Bench(engine, base.files.folder, client_id, seed)


def make_workload(
    engine: Engine, examples: Sequence[Example], shape: Shape, *, client_id: str, seed: int
) -> Workload:
    """Return the rows a client draws in its first round, from an adapter as it is after some rounds."""
    layout, training = engine.layout, shape.training
    encoded = [(example, encode(example, engine.base.tokenizer, shape.max_length)) for example in examples]
    usable = [(example, row) for example, row in encoded if row is not None]
    count, size = training.steps * training.batch_size, training.batch_size
    drawn = draw_rows(len(usable), seed=seed, client_id=client_id, start=0, count=count)
    rows = [usable[index][1] for index in drawn]
    batches = tuple(tuple(rows[begin : begin + size]) for begin in range(0, count, size))
    job = Job(client_id, started_adapter(layout, seed), batches, training)
    return Workload(tuple(usable[index][0] for index in drawn), job, layout, shape.max_length)


def started_adapter(layout: AdapterLayout, seed: int) -> torch.Tensor:
    """Return an adapter [P] that has moved from where every client starts, so that no factor is zero."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "bench-start"))
    moved = 0.01 * torch.randn(layout.size, generator=generator)
    return initial_adapter(layout, seed).vector + moved


def needed_flop(model: Any, workload: Workload) -> float:
    """Return the least arithmetic of a workload: what a step's rows all begin with is computed once."""
    total = useful_flop(model, workload.layout, workload.rows)
    for batch in workload.job.batches:
        others = len(batch) - 1
        held = len(lay_out(batch, torch.device("cpu"), [workload.job.client_id] * len(batch)).tokens_T)
        shared = (sum(len(row.tokens) for row in batch) - held) // max(1, others)
        prefix = Encoded(batch[0].tokens[:shared], (IGNORED,) * shared)
        total -= others * useful_flop(model, workload.layout, [prefix])
    return total


def shortened(workload: Workload, num_rows: int) -> Workload:
    """Return one step of the first rows of a workload."""
    job = workload.job
    batch = job.batches[0][:num_rows]
    training = replace(job.training, steps=1, batch_size=len(batch))
    brief = replace(job, batches=(batch,), training=training)
    return replace(workload, examples=workload.examples[: len(batch)], job=brief)
