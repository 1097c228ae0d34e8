"""What benchmarks share: alternated timing, spreads, the GEMM rate of this machine, and one JSON line.

CPU seconds are those of the whole process, all threads. On a shared machine they repeat far better than wall
time, and a ratio taken within one repetition cancels most of what is left.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.table import Table
from torch.nn.functional import linear

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """What one piece of work cost, in seconds."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What one piece of work gave, and what it cost."""

    value: T
    timing: Timing


@dataclass(frozen=True)
class Spread:
    """The range of a figure over the repetitions."""

    min: float
    median: float
    max: float

    def text(self, digits: int = 2) -> str:
        """Return "min / median / max"."""
        return " / ".join(f"{value:.{digits}f}" for value in (self.min, self.median, self.max))


@dataclass(frozen=True)
class Goal:
    """A figure that must reach `goal`."""

    value: float
    goal: float

    @property
    def met(self) -> bool:
        """Whether it does."""
        return self.value >= self.goal


def timed(work: Callable[[], T]) -> Measured[T]:
    """Run `work` once and return its value and cost."""
    gc.collect()  # what an earlier piece of work left behind is not this one's cost
    cpu, wall = time.process_time(), time.perf_counter()
    value = work()
    return Measured(value, Timing(time.process_time() - cpu, time.perf_counter() - wall))


def alternate(variants: Mapping[str, Callable[[], T]], repetitions: int) -> Iterator[dict[str, Measured[T]]]:
    """Yield, per repetition, every variant's measurement; each repetition starts with another variant."""
    names = list(variants)
    for repetition in range(repetitions):
        first = repetition % len(names)
        yield {name: timed(variants[name]) for name in names[first:] + names[:first]}


class Phases:
    """CPU seconds of the named parts of one piece of work."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add what runs inside to the part `name`."""
        began = time.process_time()
        yield
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - began


def spread(values: Sequence[float]) -> Spread:
    """Return the range of `values`, at least one."""
    return Spread(min(values), statistics.median(values), max(values))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the range of the quotients, each taken within one repetition."""
    return spread([top / bottom for top, bottom in zip(numerators, denominators, strict=True)])


def gemm_rate(weights: Sequence[torch.Tensor], num_tokens: int) -> float:
    """Return FLOP per CPU second of one pass of `linear` over all `weights` [D_out, D_in].

    The weights are a model's own, in its own order, so the pass reads memory as a forward pass does.
    """
    inputs = {weight.shape[1]: torch.randn(num_tokens, weight.shape[1]) for weight in weights}

    @torch.inference_mode()
    def one_pass() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    return sum(2 * num_tokens * weight.numel() for weight in weights) / timed(one_pass).timing.cpu


def figures_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """Return a table of ready-made cells, one row per name."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Return what a figure depends on besides the code; nothing that names the machine or its user."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": _commit(),
    }


def _commit() -> str:
    """Return the commit this runs from, "+" where files differ from it; "" outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    here = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def report(name: str, figures: Mapping[str, Any], goals: Mapping[str, Goal]) -> dict[str, Any]:
    """Return the JSON-ready object a benchmark prints and keeps."""
    judged = {key: {**asdict(goal), "met": goal.met} for key, goal in goals.items()}
    return {"name": name, "figures": dict(figures), "goals": judged}


def emit(result: Mapping[str, Any], *, as_json: bool, output: Path | None) -> None:
    """Keep `result` in the file `output`, and print it as the last line of stdout where `as_json` asks for it."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
