"""How many tokens a pass holds, and how that number is found.

Clients are fused until a pass is full: more tokens no longer make it faster, but need more memory. On a CPU
the number is known beforehand; on a GPU passes of growing size are timed once, and the result is remembered.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fedllm.engine.passes import Item, Passes
from fedllm.engine.probe import longest_pass
from fedllm.files import write_file
from fedllm.models.chat import IGNORED, Encoded
from fedllm.models.files import cache_folder

CPU_TOKEN_BUDGET = 512  # more no longer speeds a CPU up, and spills out of its caches
CPU_STEP_TOKENS = 4096  # a step is split above, for memory's sake
SMALLEST, LARGEST = 128, 32768  # tokens of the passes that are timed
_GOOD_ENOUGH = 0.95  # of the best rate: a smaller pass that is nearly as fast needs less memory
_LONGEST_PASS = 3.0  # seconds; on a machine this slow larger passes gain nothing


@dataclass(frozen=True)
class Limits:
    """Tokens up to which clients share a pass, and above which one step is split into passes.

    0 gives every sample a pass of its own.
    """

    together: int
    step: int


def limits_of(token_budget: int, passes: Passes) -> Limits:
    """Return the limits of a budget; samples are kept apart where attention cannot be ragged."""
    if not passes.is_ragged:
        return Limits(0, 0)
    if passes.base.device.type != "cpu":
        return Limits(token_budget, token_budget)
    # On a CPU only memory asks for splitting a step, so its limit is above the budget.
    most = min(CPU_STEP_TOKENS, longest_pass(passes.base.model))
    return Limits(token_budget, max(token_budget, most))


def default_budget(passes: Passes) -> int:
    """Return 512 on a CPU, where caches decide and a busy machine spoils a measurement; else measure."""
    base, layout = passes.base, passes.bank.layout
    if base.device.type == "cpu":
        return CPU_TOKEN_BUDGET
    if not passes.is_ragged:
        return 1
    name = torch.cuda.get_device_name(base.device)
    parts = (layout.fingerprint[:16], base.device.type, name, base.dtype, layout.size)
    key = " / ".join(map(str, parts))  # what a measurement depends on
    return remembered_budget(key, lambda: _measured_here(passes))


def remembered_budget(key: str, measure: Callable[[], int]) -> int:
    """Return the budget kept under `key`, or what `measure` returns, which is then kept."""
    file = cache_folder() / "token-budgets.json"
    if key in (known := _read(file)):
        return known[key]
    budget = measure()
    with suppress(OSError):  # a cache that cannot be written only costs the next measurement
        write_file(file, json.dumps({**_read(file), key: budget}, indent=1, sort_keys=True) + "\n")
    return budget


def measured_budget(run_pass: Callable[[int], None], device: torch.device) -> int:
    """Return the size of the smallest pass that runs at nearly the best rate, from 128 tokens upwards.

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


def _measured_here(passes: Passes) -> int:
    """Return the budget found by timing passes of samples of 64 tokens, a quarter of them learnt."""
    vocabulary = passes.base.model.config.get_text_config().vocab_size
    layout = passes.bank.layout

    def row(number: int) -> Encoded:  # no two begin alike, so nothing is shared
        tokens = tuple((7919 * index + number) % vocabulary for index in range(64))
        return Encoded(tokens, (IGNORED,) * 48 + tokens[48:])

    def run_pass(size: int) -> None:
        passes.bank.reserve(1)
        passes.losses([Item(row(number), 0, 0, 1.0) for number in range(size // 64)], backward=True)

    passes.bank.load(layout, [torch.zeros(layout.size)], [1.0])
    with passes.attached():
        return measured_budget(run_pass, passes.base.device)


def _timed(run_pass: Callable[[int], None], size: int, device: torch.device) -> float:
    """Return the seconds of one pass: CPU seconds on a CPU, where other programs would disturb the clock."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    run_pass(size)
    if device.type == "cuda":  # kernels are only queued until then
        torch.cuda.synchronize(device)
    return clock() - began


def _read(file: Path) -> dict[str, int]:
    """Return the budgets that are kept; anything else in the file counts as absent."""
    try:
        values = json.loads(file.read_text())
        return {key: value for key, value in values.items() if isinstance(value, int) and value > 0}
    except (OSError, ValueError, AttributeError):
        return {}
