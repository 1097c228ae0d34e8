"""How many tokens a forward pass should hold on this GPU: measured once, then remembered.

Too few leave the GPU waiting for its next kernel, too many leave its memory. The measurement is
a few seconds of passes of growing size; the answer is kept in the user's cache by model, device and dtype.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from fedllm.models.files import cache_folder
from fedllm.runs.atomic import write_file

SMALLEST, LARGEST = 128, 32768
_GOOD_ENOUGH = 0.95  # of the best rate: a smaller pass that is nearly as fast needs less memory
_LONGEST_PASS = 3.0  # seconds; on a machine this slow larger passes gain nothing


def remembered_budget(key: str, measure: Callable[[], int]) -> int:
    """Return the budget kept under `key`, or what `measure` returns, which is then kept."""
    file = cache_folder() / "token-budgets.json"
    known = _read(file)
    if key in known:
        return known[key]
    budget = measure()
    with suppress(OSError):  # a cache that cannot be written only costs the next measurement
        write_file(file, json.dumps({**_read(file), key: budget}, indent=1, sort_keys=True) + "\n")
    return budget


def measured_budget(run_pass: Callable[[int], None], device: torch.device) -> int:
    """Return the smallest pass whose rate is nearly the best, trying sizes from 128 tokens upwards.

    `run_pass(n)` does one forward and backward pass over n tokens.
    """
    rates: dict[int, float] = {}
    size = SMALLEST
    run_pass(size)  # the first pass also warms up
    while size <= LARGEST:
        try:
            seconds = _timed(run_pass, size, device)
        except torch.OutOfMemoryError:
            break
        rates[size] = size / seconds
        if seconds > _LONGEST_PASS or rates[size] < _GOOD_ENOUGH * max(rates.values()):
            break
        size *= 2
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= _GOOD_ENOUGH * best)


def _timed(run_pass: Callable[[int], None], size: int, device: torch.device) -> float:
    """Return the seconds of one pass: CPU seconds on a CPU, where other programs would disturb the clock."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    run_pass(size)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def _read(file: Path) -> dict[str, int]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: value for key, value in values.items() if isinstance(value, int) and value > 0}
