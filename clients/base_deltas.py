"""The base deltas this machine holds, so that a server need not send one twice.

A base delta is no secret of a data holder: it is what the server made of everybody's rounds. It is kept on
disk because a Flower node starts a new process for every message. A file's name is the digest of its content,
and a file with another content counts as absent.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedllm.adapters.base_delta import BaseDelta, from_tensors, to_tensors
from fedllm.adapters.layout import AdapterLayout
from fedllm.errors import LayoutError
from fedllm.files import write_bytes

NUM_KEPT = 2  # files; a run needs its newest alone


@dataclass(eq=False)
class BaseDeltaStore:
    """The newest base delta in memory and a few on disk."""

    folder: Path
    newest: BaseDelta | None = None

    def held(self, digest: str, layout: AdapterLayout) -> BaseDelta | None:
        """Return the base delta of that digest, or None where this machine has none."""
        if self.newest is None or self.newest.digest != digest:
            self.newest = self._load(digest, layout) or self.newest
        return self.newest if self.newest is not None and self.newest.digest == digest else None

    def keep(self, base_delta: BaseDelta) -> BaseDelta:
        """Remember a base delta and return it: the object that is resident already, where there is one."""
        if not base_delta.digest:
            return base_delta
        # The same object again, since the base model keeps its sums with a base delta by identity.
        if self.newest is not None and self.newest.digest == base_delta.digest:
            return self.newest
        self.newest = base_delta
        with suppress(OSError, SafetensorError):  # what could not be written is only sent again
            self._save(base_delta)
        return base_delta

    def _load(self, digest: str, layout: AdapterLayout) -> BaseDelta | None:
        if not re.fullmatch("[0-9a-f]{64}", digest):  # it names a file
            return None
        try:
            base_delta = from_tensors(layout, load_file(self.folder / f"{digest}.safetensors"))
        except (OSError, SafetensorError, LayoutError, ValueError):
            return None
        return base_delta if base_delta.digest == digest else None  # else it was damaged or renamed

    def _save(self, base_delta: BaseDelta) -> None:
        target = self.folder / f"{base_delta.digest}.safetensors"
        if not target.exists():
            # Copies, because factors may be views of one tensor, which safetensors refuses to write.
            copies = {name: factor.contiguous().clone() for name, factor in to_tensors(base_delta).items()}
            write_bytes(target, save(copies))
        others = [file for file in self.folder.glob("*.safetensors") if file != target]
        for old in sorted(others, key=lambda file: -file.stat().st_mtime)[NUM_KEPT - 1 :]:
            old.unlink(missing_ok=True)
