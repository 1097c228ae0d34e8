"""What a model folder must be before it is opened: whole files, plain weights, code only as permitted."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from fedllm.errors import ModelError
from fedllm.site_policy import load_policy

_READ = {".safetensors", ".json", ".model", ".txt", ".jinja"}  # endings of the files that are read
DECISIVE = _READ | {".py"}  # of the files that decide what a model computes
_POINTER = b"version https://git-lfs.github.com/spec/"
_PLAIN_WHEN_LOADED = {"mxfp4"}  # transformers turns these weights into plain ones


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no model, or from which another model than it seems would be loaded.

    Raises:
        ModelError: a file is missing or stands for another one, the weights are pickled or quantised, or an
            adapter lies among them.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so not a model folder")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no .safetensors weights; pickled weights are never loaded")
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ and file.is_file() and _begins(file, _POINTER):
            kind = file.suffix.removeprefix(".")
            raise ModelError(
                f"{file}: not a {kind} file but a git-LFS pointer to it; run `git lfs pull` there"
            )
    if not (folder / "model.safetensors").is_file():
        _check_shards(folder)
    if (folder / "adapter_config.json").is_file():  # transformers would load that adapter, unasked
        raise ModelError(
            f"{folder / 'adapter_config.json'}: an adapter lies among the base model's files and would be"
            " loaded with them; merge it, or take it out of the folder"
        )
    quantised = read_json(folder / "config.json").get("quantization_config") or {}
    method = quantised.get("quant_method")
    if quantised and method not in _PLAIN_WHEN_LOADED:
        raise ModelError(
            f"{folder / 'config.json'}: the weights are already quantised ({method}); use the"
            " model's plain weights, on a GPU with model.quantization = 4bit or 8bit"
        )


def code_digest(folder: Path) -> str:
    """Return a SHA-256 (hex) over the Python code that a model folder brings, "" where it brings none.

    It covers the name and content of every .py file, and what the configurations say of them.
    """
    named = [read_json(path).get("auto_map") for path in _configurations(folder)]
    code = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py") if path.is_file()}
    if not code and not any(named):
        return ""
    contents = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in code.items()}
    return hashlib.sha256(json.dumps([contents, named], sort_keys=True).encode()).hexdigest()


def may_run_code(folder: Path, hub_id: str = "") -> bool:
    """Return whether this machine's owner permits the code of a model folder.

    Permitted is exactly the code whose digest the policy names; and what was downloaded from the hub under
    `hub_id` where the policy names just that, with its @REVISION if it has one. What a folder says of itself
    counts for nothing.
    """
    digest, named = code_digest(folder), load_policy().allow.trust_remote_code
    if not digest or _has_code_elsewhere(folder):
        return False
    pinned = {entry.rpartition("sha256:")[2].lower() for entry in named if "sha256:" in entry}
    return digest in pinned or (bool(hub_id) and hub_id in named)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a model's file.

    Raises:
        ModelError: there is none.
    """
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(file.read_text())
        if isinstance(values, dict):
            return values
    raise ModelError(f"{file}: not a JSON object; get the model's files anew")


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder}: neither model.safetensors nor {index.name}, where weights are looked for"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError(f"{index}: names no weights; get the model's files anew")
    for shard in sorted({str(name) for name in shards.values()}):
        if not (folder / shard).is_file():
            raise ModelError(f"{folder / shard}: missing, though {index.name} names it; get it anew")


def _begins(file: Path, start: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


def _configurations(folder: Path) -> list[Path]:
    paths = (folder / name for name in ("config.json", "tokenizer_config.json"))
    return [path for path in paths if path.is_file()]


def _has_code_elsewhere(folder: Path) -> bool:
    """Return whether code may come from where no digest reaches: another repository, or outside the folder.

    A configuration names the one as "org/name--file.Class", the other by an absolute path or through a link
    to a folder. Links to files are followed by the digest; the hub's cache is made of them.
    """
    named = [json.dumps(read_json(path).get("auto_map")) for path in _configurations(folder)]
    if any("--" in names or '"/' in names for names in named):
        return True
    return any(path.is_symlink() and path.is_dir() for path in folder.rglob("*"))
