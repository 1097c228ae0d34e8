"""Time of variants of the same work, measured in turn.

CPU seconds are those of the whole process, all threads. On a shared machine they repeat far better than wall
time, and a ratio taken within one repetition cancels most of what is left. Where a GPU computes, its own
clock counts, from the moment it is idle until it is idle again.
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
CPU = torch.device("cpu")


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
    cpu = time.process_time()
    value, wall = _clocked(work)
    return Measured(value, Timing(time.process_time() - cpu, wall))


def device_seconds(work: Callable[[], object]) -> float:
    """Return the seconds of `work`; where a GPU computes, from an idle GPU to an idle GPU."""
    return _clocked(work)[1]


def _clocked(work: Callable[[], T]) -> tuple[T, float]:
    """Return the value of `work` and its seconds, by the GPU's own clock where one is in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        began = time.perf_counter()
        return work(), time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    value = work()
    end.record()
    torch.cuda.synchronize()
    return value, float(begin.elapsed_time(end)) / 1e3


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


def costs(
    timings: Sequence[Timing], reference: Sequence[Timing], device: torch.device = CPU
) -> dict[str, Spread]:
    """Return one variant's CPU and wall seconds, and those that count on `device` over those of `reference`.

    The quotient is named by what counts on a CPU.
    """
    cpu = [timing.cpu for timing in timings]
    busy, other = ([one.busy(device) for one in each] for each in (timings, reference))
    return {
        "cpu_s": spread(cpu),
        "wall_s": spread([timing.wall for timing in timings]),
        "cpu_ratio": ratios(busy, other),
    }
