"""What an architecture and a machine can do, found out by trying them rather than by their names.

Of the architecture: whether it can attend over a flat row of many samples, and whether its head is a plain
product. Of the machine: the token budget, the number of tokens at which a pass is about as fast as any.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedllm.engine.flat_row import SHORTEST_SHARED, lay_out, token_losses
from fedllm.engine.head import Head
from fedllm.errors import ModelError
from fedllm.files import write_file
from fedllm.models.attention import attends_by_interface, ragged
from fedllm.models.chat import Encoded
from fedllm.models.files import cache_folder

SMALLEST, LARGEST = 128, 32768  # tokens of the passes that are timed
_GOOD_ENOUGH = 0.95  # of the best rate: a smaller pass that is nearly as fast needs less memory
_LONGEST_PASS = 3.0  # seconds; on a machine this slow larger passes gain nothing

# What configurations call it where a model changes the logits after its head
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")
_TOLERANCE = 2e-2  # relative, in bfloat16; a wrong mask or a missing scale is off by far more


@torch.no_grad()
def can_be_ragged(model: Any, device: torch.device) -> bool:
    """Return whether many samples in one flat row, their common prefix once, give each sample's own losses.

    False for models that do not use transformers' attention interface, or do more in it than ours
    (soft-capped scores, sinks): the engine then feeds them one sample at a time.
    """
    if not attends_by_interface(model):
        return False
    # Long enough that the rows share their prefix, so that this is tried too.
    rows = [_row(model, length) for length in (SHORTEST_SHARED + 3, SHORTEST_SHARED + 7)]
    alone = [_losses(model, [row], device, Head()) for row in rows]
    try:
        with ragged(model):
            together = _losses(model, rows, device, Head())
    except ModelError:
        return False
    return _agree(torch.cat(alone), together)


@torch.no_grad()
def plain_head(model: Any, device: torch.device) -> Head:
    """Return the output layer if it alone makes logits of hidden states, else `Head()`."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or model.get_decoder() is model:
        return Head()
    config = model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _LOGIT_CHANGES):
        return Head()  # small logits hide a cap from the comparison below
    row, head = _row(model, 7), Head(layer.weight, layer.bias)
    is_plain = _agree(_losses(model, [row], device, Head()), _losses(model, [row], device, head))
    return head if is_plain else Head()


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


def _row(model: Any, length: int) -> Encoded:
    """Return a sample of `length` pseudo-random tokens, all learnt; a longer one begins with a shorter."""
    size = model.config.get_text_config().vocab_size
    tokens = tuple((7919 * index + 13) % size for index in range(length))
    return Encoded(tokens, tokens)


def _losses(model: Any, rows: list[Encoded], device: torch.device, head: Head) -> torch.Tensor:
    flat = lay_out(rows, device, [0] * len(rows))
    weights = torch.ones(len(flat.targets_N), device=device)
    return token_losses(model, flat, head, weights)[1]


def _agree(expected: torch.Tensor, found: torch.Tensor) -> bool:
    return bool((expected - found).norm() <= _TOLERANCE * expected.norm())


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
