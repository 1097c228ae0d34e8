"""Where a round's updates wait: in memory while they fit, beyond that in files without a name.

A file is mapped into memory: whoever computes with its tensor finds the same bits, and the system takes the
memory back wherever it is short of it. Since the file never has a name, nobody else can open it and nothing
is left of it however the process ends.
"""

import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedllm.engine.resident import give_back_freed

MOST_BYTES = 1 << 30


@dataclass(eq=False)
class Room:
    """Room in memory for tensors that must wait; `folder` is for the files, by default the temporary one.

    A tensor that nobody holds any more gives its room back.
    """

    most: int = MOST_BYTES
    folder: Path | None = None
    sizes: dict[int, int] = field(default_factory=dict)  # bytes in memory, by id of the tensor

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a float32 vector to hold in place of `tensor`, equal to it bit by bit."""
        if id(tensor) in self.sizes or not tensor.numel():
            return tensor
        if sum(self.sizes.values()) + tensor.nbytes > self.most:
            try:
                return _on_disk(tensor, self.folder)
            except (OSError, RuntimeError):  # no space there either, or torch cannot map it
                pass
        self.sizes[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, self.sizes.pop, id(tensor), None)
        return tensor


def _on_disk(tensor: torch.Tensor, folder: Path | None) -> torch.Tensor:
    with tempfile.TemporaryFile(dir=folder) as file:
        tensor.contiguous().numpy().tofile(file)
        give_back_freed()  # what the vectors written before took
        path = f"/dev/fd/{file.fileno()}"
        return torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
