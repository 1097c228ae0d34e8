"""Where the wide products of a round of many clients are formed: on a GPU of this process, if that is faster.

Factors of many clients side by side make products of hundreds of columns in float64, nearly all the time of
such a round. What they are read out by stays on the CPU: a GPU is slow at many small decompositions.
"""

import torch

from fedllm.adapters.shapes import CPU

WIDE = 256  # columns below which the copies to a GPU and back cost what the product saves
# Capabilities of GPUs that compute float64 at half the rate of float32; others do at 1/32 or less.
_WITH_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
_SHARE = 4  # of a GPU's free memory, one part in so many may be taken: training needs the rest


def product_device(columns: int, num_bytes: int = 0) -> torch.device:
    """Return where to form products of so many stacked columns, of which `num_bytes` stay there."""
    # A GPU that this process does not use yet is left alone: to open one takes seconds and half a gigabyte.
    if columns < WIDE or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return CPU
    # By what the GPU is, not by a measurement, so that a run done again takes the same one if memory allows.
    is_fast = torch.cuda.get_device_capability() in _WITH_FLOAT64
    if not is_fast or _SHARE * num_bytes > torch.cuda.mem_get_info()[0]:
        return CPU
    return torch.device("cuda", torch.cuda.current_device())
