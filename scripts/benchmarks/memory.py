"""How much memory a piece of work, or this whole process, needed at its peak."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc: mallopt(3), malloc.h


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


def peak_rss() -> int:
    """Return the most bytes this process has held in memory at once.

    `getrusage` would not do: a process begins there with the peak of the one that started it.

    Raises:
        RuntimeError: this system has no /proc.
    """
    try:
        return _process_bytes("VmHWM")
    except OSError:
        raise RuntimeError("peak memory is read from /proc/self/status, which this system lacks") from None
