"""Small arrays in one block of memory, so that all a pass must know reaches a device in one copy."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_ALIGNED = 16  # bytes, where an array may begin


class PassBuffer:
    """Named arrays on a device. `write` puts other values of the same sizes into the same memory."""

    def __init__(self, arrays: Mapping[str, Array], device: torch.device):
        self._begins: dict[str, int] = {}
        size = 0
        for name, array in arrays.items():
            self._begins[name] = size
            size += -(-array.nbytes // _ALIGNED) * _ALIGNED
        self._block = torch.empty(size, dtype=torch.uint8, device=device)
        self.tensors = {name: self._view(name, array) for name, array in arrays.items()}
        self.write(arrays)

    def write(self, arrays: Mapping[str, Array]) -> None:
        """Replace all values, without waiting for a GPU."""
        is_here, on_gpu = self._block.device.type == "cpu", self._block.is_cuda
        # Pinned memory is copied while this process goes on, and torch keeps it for as long as that takes.
        host = self._block if is_here else torch.empty(len(self._block), dtype=torch.uint8, pin_memory=on_gpu)
        values = host.numpy()
        for name, array in arrays.items():
            begin = self._begins[name]
            values[begin : begin + array.nbytes] = array.view(np.uint8)
        if not is_here:
            self._block.copy_(host, non_blocking=True)

    def _view(self, name: str, array: Array) -> torch.Tensor:
        begin = self._begins[name]
        return self._block[begin : begin + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
