"""`fedllm export`: an adapter merged into its base model, as a folder for transformers or a GGUF file."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard

from fedllm.adapters.folder import DESCRIPTION, PublishedAdapter, load_adapter
from fedllm.errors import CheckpointError, ConfigError
from fedllm.files import complete_folder
from fedllm.models.base import BaseModel, open_skeleton
from fedllm.models.files import ModelFiles, resolve_model
from fedllm.models.gguf_file import TYPES, check_has_form, write_gguf
from fedllm.models.merged import merged_model, save_model
from scripts.console import Console, shown_path
from scripts.finished_run import adapter_of, bare_config, check_new

_MERGED_TYPES = ("float32", "bfloat16", "float16")


def export(
    target: Path, *, merge: Path | None, gguf: Path | None, dtype: str, base: str, shard: str, as_json: bool
) -> None:
    """Write the forms that are asked for, and print where they are, their types and sizes.

    Raises:
        ConfigError: none is asked for, or not in this type, or something is in its place.
        CheckpointError: the disk does not take it.
        FedLLMError: adapter or base model cannot be loaded, or have no such form.
    """
    _check(merge, gguf, dtype)
    with adapter_of(target) as found:
        if found.note:
            Console(quiet=as_json).line(found.note)
        published = load_adapter(found.folder)
        files = resolve_model(base or (found.config or bare_config(published)).model.name)
        written = []
        if gguf is not None:
            kind = "float16" if dtype == "auto" else dtype
            _write_file(gguf, files, published, kind)
            written.append({"form": "gguf", "path": str(gguf), "dtype": kind, "bytes": gguf.stat().st_size})
        if merge is not None:
            kind = _write_folder(merge, files, published, dtype, shard, found.folder / "README.md")
            size = sum(file.stat().st_size for file in merge.iterdir())
            written.append({"form": "merged", "path": str(merge), "dtype": kind, "bytes": size})
    if as_json:
        print(json.dumps({"written": written}))
        return
    for each in written:
        path = shown_path(Path(str(each["path"])))
        Console().line(f"{each['form']}: {path} ({each['dtype']}, {int(str(each['bytes'])) / 1e6:,.1f} MB)")


def _check(merge: Path | None, gguf: Path | None, dtype: str) -> None:
    if merge is None and gguf is None:
        raise ConfigError("say what to write: --merge FOLDER, --gguf FILE, or both")
    for path, option, types in ((merge, "--merge", _MERGED_TYPES), (gguf, "--gguf", TYPES)):
        if path is not None:
            check_new(path, option)
            if dtype not in ("auto", *types):
                raise ConfigError(f"--dtype {dtype}: {option} takes auto, {', '.join(types)}")


def _write_file(file: Path, files: ModelFiles, published: PublishedAdapter, kind: str) -> None:
    check_has_form(open_skeleton(files).config)  # before the weights are read
    held = torch.float32 if kind == "q8_0" else getattr(torch, kind)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as scratch:
            building = Path(scratch) / file.name
            with merged_model(files, published.state, held) as whole:
                write_gguf(building, whole, f"{files.public_name} with a fedllm adapter", kind)
            building.chmod(0o600 if published.is_private else 0o644)
            os.replace(building, file)  # whole, or not there
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror}") from None


def _write_folder(
    folder: Path, files: ModelFiles, published: PublishedAdapter, dtype: str, shard: str, card: Path
) -> str:
    """Write a merged model, and return the type of its weights."""
    held = None if dtype == "auto" else getattr(torch, dtype)
    try:
        with (
            merged_model(files, published.state, held) as whole,
            complete_folder(folder, is_public=not published.is_private) as building,
        ):
            save_model(building, whole, shard)
            (building / "README.md").write_text(_card(card.read_text(), published, whole))
            if published.is_private:  # a merged model is as private as the adapter in it
                (building / DESCRIPTION).write_text(json.dumps({"private": True}) + "\n")
            return str(whole.model.dtype).removeprefix("torch.")
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror}") from None


def _card(of_adapter: str, published: PublishedAdapter, whole: BaseModel) -> str:
    """Return the card of a merged model: what it is, how to load it, what the adapter's card says."""
    card = ModelCard(of_adapter)
    card.data.library_name = "transformers"
    card.data.base_model_relation = "finetune"
    # How to load an adapter is of no use here.
    sections = [part for part in card.text.split("\n## ")[1:] if "PeftModel" not in part]
    name, dtype = whole.files.public_name, str(whole.model.dtype).removeprefix("torch.")
    private = "It is private: made from one client's own text, and not to be published.\n\n"
    return (
        f"""---
{card.data.to_yaml()}
---

# {name} with an adapter merged in

{private if published.is_private else ""}The weights of `{name}` plus those of the LoRA adapter
`{published.state.digest[:16]}`, added in float32 and kept in {dtype}. PEFT is not needed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{"".join(f"## {part.rstrip()}{chr(10) * 2}" for part in sections)}""".rstrip()
        + "\n"
    )
