"""Tries kernels once on a device before anything relies on them."""

import logging
from collections.abc import Callable

import torch

from fedllm.models.files import first_line

_logger = logging.getLogger("fedllm.training")


def stands_trial(device: torch.device, what: str, trial: Callable[[], bool]) -> bool:
    """Return whether kernels run on a device and their numbers are right, which `trial` returns.

    Otherwise one line says that `what` takes the plain way.
    """
    try:
        # Triton launches on the current device.
        with torch.cuda.device_of(torch.empty(0, device=device)):  # type: ignore[no-untyped-call]
            reason = "" if trial() else "its numbers are others"
    # Any error: Triton raises AssertionError without libcuda, and ImportError where it may run no program.
    except Exception as error:
        reason = first_line(error)
    if reason:
        _logger.warning("%s: %s takes the slower way (%s)", device, what, reason)
    return not reason
