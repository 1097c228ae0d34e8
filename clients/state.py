"""What a client keeps for itself between rounds: vectors that never leave this machine.

Every state of a client is one file, named by the number of rows the client had drawn when it was written. The
server counts those rows too, and only for updates it has accepted: it names the state a round goes on from,
so an update that was lost, a retried round and a resumed run all find the state they need. The newest few are
kept.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedllm.errors import CheckpointError, IntegrityError
from fedllm.files import make_private_folder, remove_unfinished, write_bytes

NUM_KEPT = 3  # a server may go back by two rounds: one under way, and one whose checkpoint was damaged
_ABOUT = "fedllm"  # the one entry of a file's metadata
_logger = logging.getLogger("fedllm.clients")


@dataclass(frozen=True)
class PrivateStore:
    """A folder of private vectors for one adapter layout, one folder a client within."""

    folder: Path
    layout_digest: str


def load_private(
    store: PrivateStore, client_id: str, num_drawn: int, sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Return the float32 vectors a client kept when it had drawn `num_drawn` rows.

    `sizes` are the lengths of those that are wanted. Before a client's first round there are none. Where they
    are missing or damaged later, one line is logged and there are none either: the client starts afresh.
    """
    if not num_drawn:
        return {}
    file = _file(store, client_id, num_drawn)
    try:
        return _read(file, store, sizes)
    except FileNotFoundError:
        _logger.warning("client %s: no private state in %s; it starts afresh", client_id, file.parent)
    except (OSError, SafetensorError, IntegrityError, ValueError) as error:
        what = str(error) if isinstance(error, IntegrityError) else type(error).__name__
        _logger.warning("client %s: %s is damaged (%s); it starts afresh", client_id, file, what)
    return {}


def load_newest(store: PrivateStore, client_id: str) -> dict[str, torch.Tensor]:
    """Return all vectors that a client kept last; {} where there are none.

    Raises:
        IntegrityError: they are damaged or of another layout.
    """
    states = sorted((store.folder / client_id).glob("*.safetensors"))
    try:
        return _read(states[-1], store, {}) if states else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise IntegrityError(f"{states[-1]}: cannot be read ({type(error).__name__})") from None


def save_private(
    store: PrivateStore, client_id: str, num_drawn: int, vectors: Mapping[str, torch.Tensor]
) -> None:
    """Keep `vectors` as the state of a client that has drawn `num_drawn` rows, in one step.

    States of more rows are removed: they belong to a future that did not come about, or to another run.

    Raises:
        CheckpointError: it could not be written; earlier states are untouched.
    """
    file = _file(store, client_id, num_drawn)
    tensors = {name: vector.float().contiguous() for name, vector in vectors.items()}
    about = {"layout": store.layout_digest, "sha256": _digest(tensors)}
    content = save(tensors, {_ABOUT: json.dumps(about)})  # one entry: safetensors keeps no order of several
    try:
        make_private_folder(file.parent)
        remove_unfinished(file.parent)  # what a killed process left of this client
        write_newest(file, content)
    except OSError as error:
        raise CheckpointError(
            f"client {client_id}: private state cannot be written in {file.parent} ({error.strerror});"
            " free space or set state-path"
        ) from None


def write_newest(file: Path, content: bytes) -> None:
    """Write a .safetensors file, and remove the others of its folder but the few before it.

    Those after it belong to a future that did not come about. Raises OSError.
    """
    write_bytes(file, content)
    states = sorted(file.parent.glob("*.safetensors"))
    place = states.index(file)
    for old in (*states[: max(0, place + 1 - NUM_KEPT)], *states[place + 1 :]):
        old.unlink(missing_ok=True)


def _read(file: Path, store: PrivateStore, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as content:
        about = json.loads((content.metadata() or {}).get(_ABOUT, "{}"))
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    if not isinstance(about, dict) or about.get("layout") != store.layout_digest:
        raise IntegrityError("it is of another adapter layout")
    if any(name not in tensors or tensors[name].shape != (size,) for name, size in sizes.items()):
        raise IntegrityError("it holds other vectors than this run keeps")
    if about.get("sha256") != _digest(tensors):
        raise IntegrityError("its checksum is wrong")
    return tensors


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].numpy().tobytes())
    return hasher.hexdigest()


def _file(store: PrivateStore, client_id: str, num_drawn: int) -> Path:
    return store.folder / client_id / f"drawn-{num_drawn:012d}.safetensors"
