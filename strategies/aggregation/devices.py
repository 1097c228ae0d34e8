"""Where the wide products of a round of many clients are formed: on a GPU of this process, if that is faster.

Factors of many clients side by side make products of hundreds of columns in float64, nearly all the time of
such a round. What they are read out by stays on the CPU: a GPU is slow at many small decompositions.
"""

import time
from functools import cache

import torch

from fedllm.adapters.shapes import CPU

WIDE = 256  # columns below which the copies to a GPU and back cost what the product saves
_SHARE = 4  # of a GPU's free memory, one part in so many may be taken: training needs the rest


def product_device(columns: int, num_bytes: int = 0) -> torch.device:
    """Return where to form products of so many stacked columns, of which `num_bytes` stay there."""
    # A GPU that this process does not use yet is left alone: to open one takes seconds and half a gigabyte.
    if columns < WIDE or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return CPU
    return _faster() if _SHARE * num_bytes <= torch.cuda.mem_get_info()[0] else CPU


@cache
def _faster() -> torch.device:
    """Return the faster of CPU and GPU at a product of float32 factors that come from the CPU."""
    factors = torch.ones(2, 1024, 1024)

    def seconds(device: torch.device) -> float:
        began = time.perf_counter()
        left, right = factors.to(device).double()
        (left @ right).cpu()
        return time.perf_counter() - began

    gpu = torch.device("cuda", torch.cuda.current_device())
    return min((CPU, gpu), key=lambda device: min(seconds(device) for _ in range(3)))
