"""Time of variants of the same work, measured in turn.

CPU seconds are those of the whole process, all threads. On a shared machine they repeat far better than wall
time, and a ratio taken within one repetition cancels most of what is left. Where a GPU computes, the clock
counts, read when the GPU has finished.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from scripts.reports import Spread, ratios, spread

T = TypeVar("T")


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


def costs(timings: Sequence[Timing], reference: Sequence[Timing]) -> dict[str, Spread]:
    """Return one variant's CPU and wall seconds, and its CPU seconds over those of `reference`."""
    cpu = [timing.cpu for timing in timings]
    return {
        "cpu_s": spread(cpu),
        "wall_s": spread([timing.wall for timing in timings]),
        "cpu_ratio": ratios(cpu, [timing.cpu for timing in reference]),
    }
