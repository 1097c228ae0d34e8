"""Options that several benchmarks have, and how one starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fedllm.models.files import EMBEDDED_ALIAS
from scripts.charts import Plot
from scripts.command_line import Json, Output, Quick, Seed
from scripts.reports import environment

Repetitions = Annotated[int, typer.Option(min=1, help="Of every figure.")]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of every benchmark."""

    quick: Quick = False
    repetitions: Repetitions = 3
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 1
    json: Json = False
    output: Output = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BenchOptions):
    """Options of a benchmark of the tiny model and one other."""

    seed: Seed = 0
    model: Annotated[str, typer.Option(help="After the tiny one: a base model, or random-1.5b.")] = (
        EMBEDDED_ALIAS
    )
    targets: Annotated[str, typer.Option(help="Adapted layers, as lora.target-modules.")] = "all-linear"
    plot: Plot = None


def start_benchmark(options: BenchOptions, packages: Sequence[str]) -> tuple[Console, dict[str, Any]]:
    """Set the threads; return where a person reads, which leaves stdout to JSON, and the environment."""
    torch.set_num_threads(options.threads)
    return Console(stderr=options.json, highlight=False, markup=False), environment(packages)
