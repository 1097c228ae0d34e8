"""A base model with an adapter merged into it: one ordinary model, which every tool loads without PEFT.

W0 + scale * B A is formed in float32 or wider and rounded once to the type that is asked for.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedllm.adapters.base_delta import BaseDelta
from fedllm.adapters.layout import AdapterState
from fedllm.errors import ModelError
from fedllm.models.base import BaseModel, ChosenModel, check_fits, load_chosen, load_tokenizer, open_skeleton
from fedllm.models.files import ModelFiles, copy_tokenizer, first_line, quiet_transformers
from fedllm.models.with_base_delta import with_base_delta

_TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # what has to go with a copy of the weights


@contextmanager
def merged_model(
    files: ModelFiles, adapter: AdapterState, dtype: torch.dtype | None = None
) -> Iterator[BaseModel]:
    """Yield the base model of `files` on the CPU with `adapter` in its weights; None = the files' own type.

    Raises:
        LayoutError: the adapter is of another base model.
        ModelError: the base model cannot be loaded.
    """
    stored = stored_dtype(files)
    dtype = dtype or stored
    # Loaded in the narrower of two types, either the weights or the sums would be rounded twice.
    wide = torch.promote_types(stored, dtype)
    chosen = ChosenModel(files, torch.device("cpu"), wide, quantization="none", checkpointing=False)
    base, layout = load_chosen(chosen, load_tokenizer(files)), adapter.layout
    check_fits(layout, base)
    pairs = tuple((b_OR, a_RI) for a_RI, b_OR in layout.factors(adapter.vector))
    with with_base_delta(base, BaseDelta(layout, pairs)):
        base.model.to(dtype)
        yield base


def stored_dtype(files: ModelFiles) -> torch.dtype:
    """Return the type in which a model's files hold its weights, as its configuration says."""
    dtype = getattr(open_skeleton(files).config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def save_model(folder: Path, base: BaseModel, max_shard_size: str) -> None:
    """Write weights, configuration, tokenizer and terms of use of a model into a folder.

    Raises:
        ModelError: transformers refuses to write it, as with generation settings that contradict each other.
        OSError: the disk does not take it.
    """
    from safetensors import SafetensorError

    model: Any = base.model
    try:
        with quiet_transformers():
            model.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:  # so it reports a full disk too
        raise OSError(errno.EIO, first_line(error)) from None
    except ValueError as error:
        raise ModelError(f"cannot write {base.files.public_name}: {first_line(error)}") from None
    copy_tokenizer(base.files.folder, folder)
    for pattern in _TERMS:
        for file in base.files.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
