"""Clients trained at once compared with FlowerTune's client and TRL's trainer, and texts written at once."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.data.fields import Example, Turn
from fedllm.engine.engine import Engine
from fedllm.messages import LocalTraining
from fedllm.models.base import layout_of, load_base
from scripts.benchmarks.agreement import TOLERANCES, delta_difference
from scripts.benchmarks.models import vocabulary_of
from scripts.benchmarks.peers.flowertune import train_afresh
from scripts.benchmarks.peers.shared import Outcome, missing_package, quiet_huggingface
from scripts.benchmarks.timing import device_seconds
from scripts.benchmarks.workloads import Shape, Workload, make_workload, started_adapter
from scripts.reports import Spread, spread

SHAPE = Shape(LocalTraining(steps=4, batch_size=4, learning_rate=1e-3, weight_decay=0.0, clip_norm=1.0), 128)
QUICK_SHAPE = Shape(
    LocalTraining(steps=1, batch_size=2, learning_rate=1e-3, weight_decay=0.0, clip_norm=1.0), 32
)
CLIENTS, QUICK_CLIENTS = 32, 2
ADAPTERS, TEXTS, WRITTEN = 8, 256, 128
QUICK_TEXTS, QUICK_WRITTEN = 8, 8
PROMPT_TOKENS = 16


def open_engine(model: str, device: str) -> Engine:
    """Return an engine on a model that lies on disk, with adapters on every linear layer."""
    base = load_base(ModelConfig(name=model, device=device))
    return Engine(base, layout_of(base.model, LoraConfig(target_modules="all-linear"), base.fingerprint))


def measure_clients(model: str, device: str, *, quick: bool) -> dict[str, Any]:
    """Return seconds of a client's round here and by the peers, alternating, and their quotients."""
    engine = open_engine(model, device)
    shape, number = (QUICK_SHAPE, QUICK_CLIENTS) if quick else (SHAPE, CLIENTS)
    works = [
        make_workload(engine, texts_of(client, shape), shape, client_id=str(client), seed=client)
        for client in range(number)
    ]
    with tempfile.TemporaryDirectory() as scratch, quiet_huggingface():
        return _compare(engine, works, Path(scratch), repetitions=2 if quick else 3)


def _compare(engine: Engine, works: list[Workload], scratch: Path, repetitions: int) -> dict[str, Any]:
    base, device = engine.base, engine.base.device
    jobs, work = [one.job for one in works], works[0]
    outcomes: dict[str, Outcome] = {}

    def ours() -> None:
        outcomes["fedllm"] = Outcome(next(iter(list(engine.train(jobs)))).delta, {})

    def flowertune() -> None:
        outcomes["FlowerTune"] = train_afresh(base.files.folder, work, scratch, device=device)

    def trl() -> None:
        from scripts.benchmarks.peers.trl import train_with_trl

        folder = base.files.folder
        outcomes["TRL"] = train_with_trl(folder, work, scratch, model=base.model, device=device)

    variants = {"fedllm": ours, "FlowerTune": flowertune} | ({} if missing_package("trl") else {"TRL": trl})
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        for name, variant in variants.items():
            seconds = device_seconds(variant)
            if repetition:  # the first warms all of them
                times[name].append(seconds / (len(jobs) if name == "fedllm" else 1))
    own, share = times["fedllm"], TOLERANCES[base.dtype].share
    return {
        "clients": len(jobs),
        "tokens": work.num_tokens,
        "ms_a_client": {name: spread([1e3 * value for value in values]) for name, values in times.items()},
        # What most values of the first client's delta differ by at most, over its largest movement.
        "delta_difference": {
            name: delta_difference(one.delta.cpu(), outcomes["fedllm"].delta.cpu(), share)
            for name, one in outcomes.items()
        },
        "times_faster_than": {
            name: spread([theirs / mine for theirs, mine in zip(times[name], own, strict=True)])
            for name in variants
            if name != "fedllm"
        },
    }


def texts_of(client: int, shape: Shape) -> list[Example]:
    """Return rows of one client that fill a row's tokens, nearly all of them the answer's."""
    needed = shape.training.steps * shape.training.batch_size
    words = ["ledger", "harbour", "copper", "window", "engine", "meadow", "signal", "garden"]

    def text(row: int, length: int) -> str:
        return " ".join(words[(client + row * 3 + index * (1 + row)) % len(words)] for index in range(length))

    return [
        Example(turns=(Turn("user", text(row, 1)), Turn("assistant", text(row + 1, 400))))
        for row in range(needed)
    ]


def measure_generation(model: str, device: str, *, quick: bool) -> dict[str, Any]:
    """Return the seconds of writing many texts from several adapters at once."""
    engine = open_engine(model, device)
    number, length = (QUICK_TEXTS, QUICK_WRITTEN) if quick else (TEXTS, WRITTEN)
    vectors = [started_adapter(engine.layout, seed) for seed in range(ADAPTERS)]
    vocabulary = vocabulary_of(engine.base)
    beginnings = [
        [(7919 * index + 31 * text) % vocabulary for index in range(PROMPT_TOKENS)] for text in range(number)
    ]
    written: list[int] = []

    def write() -> None:
        texts = engine.continue_rows(
            engine.layout,
            [vectors[text % ADAPTERS] for text in range(number)],
            beginnings,
            length,
            _likeliest,
        )
        written[:] = [sum(map(len, texts))]

    seconds = [device_seconds(write) for _ in range(2 if quick else 4)]
    found: Spread = spread(seconds[1:])
    return {"texts": number, "adapters": ADAPTERS, "tokens": written[0], "s": found}


def _likeliest(rows: range, step_1: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    """Return every row's likeliest token that ends no text, so that all texts have one length."""
    return logits_BV[:, PROMPT_TOKENS:].argmax(dim=1) + PROMPT_TOKENS
