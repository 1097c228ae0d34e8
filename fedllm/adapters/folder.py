"""The published form of an adapter: a standard PEFT folder, plus what makes loading it strict.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT, vLLM and lm-eval read. `fedllm.json`
holds the layout with the base model's fingerprint, and `manifest.json` the SHA-256 of every file: PEFT alone
accepts renamed keys, missing keys, NaN and flipped bits without a word. `adapter.sig.json` says who
vouches for all of it, where it was signed (`fedllm.signing`).
"""

import errno
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState, layout_from_dict
from fedllm.adapters.peft_reading import peft_config
from fedllm.errors import FedLLMError, IntegrityError
from fedllm.files import SIGNATURE, complete_folder, verify_manifest
from fedllm.signing.trust import check_trusted

WEIGHTS = "adapter_model.safetensors"
DESCRIPTION = "fedllm.json"


@dataclass(frozen=True, eq=False)
class PublishedAdapter:
    """An adapter as loaded from its folder, with the base model it names; a private one is one client's."""

    state: AdapterState
    base_model: str
    revision: str
    is_private: bool = False


def save_adapter(
    folder: Path,
    state: AdapterState,
    *,
    base_model: str,
    revision: str,
    target_modules: Sequence[str],
    card: str,
    finish: Callable[[Path], None] = lambda building: None,
    is_public: bool = True,
) -> None:
    """Write the PEFT folder of `state` in one step; `card` becomes its README.md.

    `finish` is called with the folder before it takes its name: it may add files, and where it raises nothing
    is published. One that is not public is marked, so that no command publishes it, and only this user can
    open it.

    Raises:
        NonFiniteError: the adapter holds NaN or infinite values, which are never published.
    """
    state.checked_finite()
    layout = state.layout
    config = peft_config(layout.rank, layout.alpha, target_modules, base_model=base_model, revision=revision)
    description: dict[str, object] = {"base_model": base_model, "revision": revision}
    description |= {"layout": layout.to_dict()} | ({} if is_public else {"private": True})
    with complete_folder(folder, is_public=is_public) as building:
        config.save_pretrained(str(building))
        save_tensors(building / WEIGHTS, state)
        (building / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        (building / "README.md").write_text(card)
        finish(building)


def replace_card(folder: Path, card: str) -> None:
    """Replace the README.md of a published adapter; a signature, which was of another card, goes."""
    with complete_folder(folder, is_public=True) as building:
        shutil.copytree(folder, building, ignore=shutil.ignore_patterns(SIGNATURE), dirs_exist_ok=True)
        (building / "README.md").write_text(card)


def load_adapter(folder: Path, *, made_here: bool = False) -> PublishedAdapter:
    """Return the adapter in a folder written by `save_adapter`, or refuse it.

    One that this machine has just made itself (`made_here`) needs no signature, whatever its policy.

    Raises:
        PolicyError: this machine's policy asks for a signature, or for a later version.
        IntegrityError: a file is missing, extra, pickled or changed; a tensor is missing, renamed, of another
            shape or dtype, or not finite.
    """
    # Unpickling runs code, so such a file is refused before anything else is read.
    pickled = [file.name for file in folder.glob("*") if file.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    if pickled:
        raise IntegrityError(f"{folder / pickled[0]}: pickled weights are never loaded; use {WEIGHTS}")
    if not (folder / WEIGHTS).is_file():
        raise IntegrityError(f"{folder}: no {WEIGHTS}, so not an adapter folder")
    verify_manifest(folder)
    if not made_here:
        check_trusted(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        state = load_tensors(folder / WEIGHTS, layout_from_dict(description["layout"])).checked_finite()
        names = str(description["base_model"]), str(description["revision"])
        return PublishedAdapter(state, *names, is_private="private" in description)
    except (OSError, ValueError, KeyError, TypeError, FedLLMError) as error:
        what = str(error) if isinstance(error, FedLLMError) else type(error).__name__
        raise IntegrityError(f"{folder}: not an adapter published by fedllm ({what})") from None


def save_tensors(file: Path, state: AdapterState) -> None:
    """Write an adapter as a safetensors file.

    Raises:
        OSError: it could not be written.
    """
    save_named(file, state.tensors())


def save_named(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors as a safetensors file; raises as `save_tensors`."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file  # torch's refuses tensors that share memory, as views of a vector

    arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    try:
        save_file(arrays, file, metadata={"format": "pt"})
    except SafetensorError as error:  # so it reports a full disk too
        raise OSError(errno.EIO, str(error)) from None


def load_named(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        IntegrityError: the file is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError:
        raise IntegrityError(f"{file}: not a safetensors file") from None


def load_tensors(file: Path, layout: AdapterLayout) -> AdapterState:
    """Return the adapter in a safetensors file whose names, shapes and dtypes are exactly the layout's.

    Raises:
        IntegrityError: they are not, or the file is not safetensors.
    """
    tensors = load_named(file)
    expected = {spec.name: spec for spec in layout.tensors}
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise IntegrityError(f"{file}: tensor {name!r} is {'missing' if name in expected else 'unexpected'}")
    for spec in layout.tensors:  # before anything of the size that is claimed is allocated
        tensor = tensors[spec.name]
        if tensor.shape != spec.shape or tensor.dtype != torch.float32:
            shape = tuple(tensor.shape)
            raise IntegrityError(
                f"{file}: {spec.name} is {tensor.dtype} {shape}, expected float32 {spec.shape}"
            )
    vector = torch.empty(layout.size)
    for spec, view in layout.views(vector):
        view.copy_(tensors[spec.name])
    return AdapterState(layout, vector)
