"""What benchmarks share: alternated timing, spreads, the GEMM rate of this machine, and one JSON line.

CPU seconds are those of the whole process, all threads. On a shared machine they repeat far better than wall
time, and a ratio taken within one repetition cancels most of what is left. Where a GPU computes, the clock
counts, read when the GPU has finished.
"""

import argparse
import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.nn.functional import linear

from fedllm.adapters.layout import AdapterLayout
from fedllm.errors import FedLLMError
from fedllm.models.base import target_modules
from fedllm.models.chat import Encoded
from scripts.reports import Spread, ratios, spread

T = TypeVar("T")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc: mallopt(3), malloc.h


@dataclass(frozen=True)
class Timing:
    """What one piece of work cost, in seconds."""

    cpu: float
    wall: float

    def busy(self, device: torch.device) -> float:
        """Return the seconds that count on `device`: CPU seconds, or the clock's for a GPU."""
        return self.wall if device.type == "cuda" else self.cpu


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What one piece of work gave, and what it cost."""

    value: T
    timing: Timing


def timed(work: Callable[[], T]) -> Measured[T]:
    """Run `work` once and return its value and cost."""
    gc.collect()  # what an earlier piece of work left behind is not this one's cost
    _wait_for_gpu()
    cpu, wall = time.process_time(), time.perf_counter()
    value = work()
    _wait_for_gpu()
    return Measured(value, Timing(time.process_time() - cpu, time.perf_counter() - wall))


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def alternate(variants: Mapping[str, Callable[[], T]], repetitions: int) -> Iterator[dict[str, Measured[T]]]:
    """Yield, per repetition, every variant's measurement; each repetition starts with another variant."""
    names = list(variants)
    for repetition in range(repetitions):
        first = repetition % len(names)
        yield {name: timed(variants[name]) for name in names[first:] + names[:first]}


def peak_memory(work: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Return the value of `work` and the bytes that it needed at its peak beyond those held before.

    On a GPU these are its tensors, on Linux the pages of the process, which include what libraries set up on
    first use; so warm up first. None where the system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return work(), torch.cuda.max_memory_allocated(device) - before
    try:
        allocator = ctypes.CDLL(None)
        allocator.malloc_trim(0)  # freed pages go back, or work would find them and need no new ones
        # Large blocks get pages of their own: one freed within the heap may be a few bytes too short for the
        # next tensor of its size, and both would be counted.
        allocator.mallopt(MMAP_THRESHOLD, 2**20)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here: proc(5)
    except (OSError, AttributeError):
        return work(), None
    resident = _process_bytes("VmRSS")
    value = work()
    peak = _process_bytes("VmHWM")
    allocator.mallopt(MMAP_THRESHOLD, 32 * 2**20)  # where it comes to by itself with large tensors
    allocator.mallopt(TRIM_THRESHOLD, 64 * 2**20)
    return value, max(0, peak - resident)


def _process_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


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


def gemm_rate(weights: Sequence[torch.Tensor], num_tokens: int) -> float:
    """Return FLOP per second of one pass of `linear` over all `weights` [D_out, D_in], on their own device.

    The weights are a model's own, in its own order, so the pass reads memory as a forward pass does. Seconds
    are those that count there (`Timing.busy`).
    """
    inputs = {weight.shape[1]: weight.new_empty(num_tokens, weight.shape[1]).normal_() for weight in weights}

    @torch.inference_mode()
    def one_pass() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    seconds = timed(one_pass).timing.busy(weights[0].device)
    return sum(2 * num_tokens * weight.numel() for weight in weights) / seconds


def trunk_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of every linear layer of a language model but its head, in its own order."""
    return {name: model.get_submodule(name).weight for name in target_modules(model, "all-linear")}


def useful_flop(model: Any, layout: AdapterLayout, rows: Sequence[Encoded]) -> float:
    """Return the arithmetic of training on `rows`: no padding, no forward pass twice, no unlearnt logit.

    Per token 2 FLOP per trunk weight forward, 2 per weight above the lowest adapter backward (a frozen weight
    has no gradient) and 6 per adapter value; 4 per head weight and learnt token; causal attention. The model
    is of the Llama kind: one width in every layer.
    """
    config, sizes = model.config, {name: weight.numel() for name, weight in trunk_weights(model).items()}
    lowest = list(sizes).index(layout.matrices[0].module)
    above = sum(list(sizes.values())[lowest + 1 :])
    trunk = (2 * sum(sizes.values()) + 2 * above + 6 * layout.size) * sum(len(row.tokens) for row in rows)
    head = 4 * config.vocab_size * config.hidden_size * sum(row.num_supervised for row in rows)
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    attention = 6 * width * sum(len(row.tokens) ** 2 for row in rows)
    return float(trunk + head + attention)


def costs(timings: Sequence[Timing], reference: Sequence[Timing]) -> dict[str, Spread]:
    """Return one variant's CPU and wall seconds, and its CPU seconds over those of `reference`."""
    cpu = [timing.cpu for timing in timings]
    return {
        "cpu_s": spread(cpu),
        "wall_s": spread([timing.wall for timing in timings]),
        "cpu_ratio": ratios(cpu, [timing.cpu for timing in reference]),
    }


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


def bench_parser(description: str, quick: str) -> argparse.ArgumentParser:
    """Return a parser of the options every benchmark has; `quick` says what --quick leaves."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=f"{quick}; under 3 minutes on 2 cores")
    parser.add_argument("--repetitions", type=int, default=3, help="of every figure (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and the starts (default: 0)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.add_argument("--output", type=Path, help="also keep the JSON object in this file")
    return parser


def run(main: Callable[[], None]) -> None:
    """Run a benchmark as a command: what a person can mend is one line on stderr and exit code 2."""
    try:
        main()
    except FedLLMError as error:
        sys.stderr.write(f"fedllm: {error}\n")
        sys.exit(2)
