"""How many tokens and adapters a pass holds, and how those numbers are found.

Clients are fused until a pass is full: more tokens no longer make it faster, but need more memory. On a CPU
the number is known beforehand; on a GPU passes of growing size are timed once, and the result is remembered.
Where memory runs out nevertheless, passes get smaller. Each adapter that is trained needs memory too, and
where many clients have few rows, that is what fills a GPU.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from sys import maxsize

import torch

from fedllm.engine.passes import Item, Passes
from fedllm.engine.probe import longest_pass
from fedllm.models.chat import IGNORED, Encoded
from fedllm.models.measured import remembered

BUDGETS = "token-budgets.json"  # in the user's cache
CPU_TOKEN_BUDGET = 512  # more no longer speeds a CPU up, and spills out of its caches
CPU_HALF_BUDGET = 2048  # matrix units are so fast that calls count: 1.2 to 1.3 times the rate of 512 at 135M
CPU_STEP_TOKENS = 4096  # a step is split above, for memory's sake
SMALLEST, LARGEST = 128, 32768  # tokens of the passes that are timed
_GOOD_ENOUGH = 0.95  # of the best rate: a smaller pass that is nearly as fast needs less memory
_LONGEST_PASS = 3.0  # seconds; on a machine this slow larger passes gain nothing
# Numbers held for each trained value of a client: it, its start, gradient and moments, and two in a step.
_VALUES_HELD = 7
_CLIENT_TOKENS = 256  # of a client in a pass that is timed

_logger = logging.getLogger("fedllm.training")


@dataclass(frozen=True)
class Limits:
    """Tokens up to which clients share a pass, and above which one step is split into passes.

    0 gives every sample a pass of its own. At most `rows` clients, or private examples, are held at once.
    """

    together: int
    step: int
    rows: int


def limits_of(token_budget: int, rows: int, passes: Passes) -> Limits:
    """Return the limits of a budget; samples are kept apart where attention cannot be ragged."""
    if not passes.is_ragged:
        return Limits(0, 0, rows)
    if passes.base.device.type != "cpu":
        return Limits(token_budget, token_budget, rows)
    # On a CPU only memory asks for splitting a step, so its limit is above the budget.
    most = min(CPU_STEP_TOKENS, longest_pass(passes.base.model))
    return Limits(token_budget, max(token_budget, most), rows)


def rows_in_memory(passes: Passes) -> int:
    """Return how many clients may be held at once: on a GPU those that fill half of its free memory."""
    if passes.base.device.type != "cuda":
        return maxsize
    free, _ = _memory(passes.base.device)
    return max(1, free // (2 * _VALUES_HELD * passes.bank.dtype.itemsize * passes.bank.layout.size))


def smaller_budget(token_budget: int, lengths: Sequence[int]) -> int:
    """Return a budget for rows of these lengths in place of one that was too large; 0 if there is none."""
    filled = min(token_budget, sum(lengths))
    if filled <= max(lengths, default=0):  # each row had a pass of its own
        return 0
    _logger.warning("memory ran out: a pass holds at most %d tokens from here on", filled // 2)
    return filled // 2


def default_budget(passes: Passes, rows: int) -> int:
    """Return what is known of a CPU, where a busy machine spoils a measurement; else measure."""
    base = passes.base
    if base.device.type == "cpu":
        return cpu_budget(base.dtype)
    if not passes.is_ragged:
        return 1
    return remembered(BUDGETS, _circumstances(passes), lambda: _measured_here(passes, rows))


def cpu_budget(dtype: torch.dtype) -> int:
    """Return the token budget of a CPU whose weights are of `dtype`."""
    return CPU_TOKEN_BUDGET if dtype.itemsize >= 4 else CPU_HALF_BUDGET


def measured_budget(run_pass: Callable[[int], None], wait: Callable[[], None]) -> int:
    """Return the size of the smallest pass that runs at nearly the best rate, from 128 tokens upwards.

    `run_pass(n)` asks a GPU for one forward and backward pass over n tokens; `wait` waits until it is done.
    """
    rates: dict[int, float] = {}
    size = SMALLEST
    run_pass(size)  # the first pass also warms up
    while size <= LARGEST:
        try:
            for _ in range(2):  # once as kernels are compiled, once as the pass may be recorded
                run_pass(size)
            wait()
            began = time.perf_counter()
            run_pass(size)
            wait()
            seconds = time.perf_counter() - began
            run_pass(size * 7 // 8)  # a pass of another kind must fit beside a recording's memory
        except torch.OutOfMemoryError:
            break
        rates[size] = size / seconds
        if seconds > _LONGEST_PASS or rates[size] < _GOOD_ENOUGH * max(rates.values()):
            break
        size *= 2
    best = max(rates.values(), default=0.0)
    return min((size for size, rate in rates.items() if rate >= _GOOD_ENOUGH * best), default=SMALLEST)


def _circumstances(passes: Passes) -> str:
    """Return all that a measured budget depends on, as one line."""
    base, layout = passes.base, passes.bank.layout
    free, total = _memory(base.device)
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in base.model.modules())
    parts = (
        layout.fingerprint[:16],
        layout.size,
        base.dtype,
        f"weights of {base.model.get_memory_footprint() >> 20} MiB",  # quantised or not
        "checkpointing" if recomputes else "all activations",
        torch.cuda.get_device_name(base.device),
        f"{8 * free // total}/8 free",
        f"torch {torch.__version__}",
    )
    return " / ".join(map(str, parts))


def _memory(device: torch.device) -> tuple[int, int]:
    """Return how many bytes of a GPU are free, and how many it has."""
    torch.cuda.empty_cache()  # what torch only keeps for later is free too
    return torch.cuda.mem_get_info(device)


def _measured_here(passes: Passes, rows: int) -> int:
    """Return the budget found by timing passes of samples of 64 tokens, a quarter of them learnt.

    As in training there is a client to every few samples, and memory holds what their optimizer needs.
    """
    vocabulary = passes.base.model.config.get_text_config().vocab_size
    bank, layout = passes.bank, passes.bank.layout
    held = bank.theta_CP

    def item(number: int, num_clients: int) -> Item:  # no two begin alike, so nothing is shared
        tokens = tuple((7919 * index + number) % vocabulary for index in range(64))
        row = Encoded(tokens, (IGNORED,) * 48 + tokens[48:])
        client = min(64 * number // _CLIENT_TOKENS, num_clients - 1)
        return Item(row, client, client, 1.0)

    @lru_cache(maxsize=2)  # made before the clock runs
    def items(size: int, num_clients: int) -> list[Item]:
        return [item(number, num_clients) for number in range(size // 64)]

    def run_pass(size: int) -> None:
        nonlocal held
        num_clients = min(rows, max(1, size // _CLIENT_TOKENS))
        if len(held) != num_clients * (_VALUES_HELD - 2):
            bank.load(layout, [torch.zeros(layout.size)] * num_clients, [1.0] * num_clients)
            held = bank.theta_CP.new_empty(num_clients * (_VALUES_HELD - 2), layout.size)
        bank.reserve(num_clients)
        passes.losses(items(size, num_clients), backward=True)

    with passes.attached():
        budget = measured_budget(run_pass, partial(torch.cuda.synchronize, passes.base.device))
    if passes.shelf is not None:
        passes.shelf.clear()
    bank.release()
    return budget
