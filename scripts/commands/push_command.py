"""`fedllm push`: a published adapter or merged model to the Hugging Face hub, once its files were shown."""

import fnmatch
import json
import sys
from pathlib import Path

import typer
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError

from fedllm.adapters.folder import DESCRIPTION, WEIGHTS
from fedllm.errors import ConfigError, FedLLMError
from fedllm.files import MANIFEST, SIGNATURE, verify_manifest
from fedllm.models.files import TOKENIZER_FILES, first_line
from fedllm.signing.trust import check_trusted
from scripts.console import Console, shown_path
from scripts.finished_run import find_adapter

# All that may leave by this command; what else lies in the folder stops it.
PUBLIC = (
    *("README.md", "adapter_config.json", WEIGHTS, DESCRIPTION, MANIFEST, SIGNATURE, *TOKENIZER_FILES),
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)


def push(target: Path, repo: str, *, private: bool, yes: bool, as_json: bool) -> None:
    """Show what would go where, ask, and upload it in one commit.

    Raises:
        ConfigError: there is nothing that may be published, nobody to ask, or no token.
        IntegrityError: a file was added or changed since the folder was written.
        FedLLMError: the hub cannot be reached, or refuses.
    """
    folder, files = publishable(target)
    console, token = Console(quiet=as_json), get_token()
    for file in files:
        console.line(f"  {file.stat().st_size:>12,}  {file.name}")
    total = sum(file.stat().st_size for file in files)
    seen = "you and whom you let" if private else "everybody"
    console.line(
        f"{len(files)} files, {total:,} bytes, from {shown_path(folder)} to {repo}, for {seen} to read"
    )
    if token is None:
        raise ConfigError("no token of the hub: run `hf auth login` once, or set HF_TOKEN")
    if not yes and not sys.stdin.isatty():
        raise ConfigError("nobody is there to be asked: look at the list above, then add --yes")
    if not yes and not typer.confirm("upload?", err=as_json):
        return
    try:
        hub = HfApi(token=token)
        name = hub.create_repo(repo, private=private, exist_ok=True).repo_id
        done = hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[file.name for file in files],
            commit_message="Upload by fedllm",
        )
    except (HTTPError, HFValidationError, OSError, ValueError) as error:
        raise FedLLMError(f"the hub did not take it: {type(error).__name__}: {first_line(error)}") from None
    if as_json:
        print(json.dumps({"url": done.commit_url, "bytes": total, "files": [file.name for file in files]}))
    else:
        console.line(f"published: {done.commit_url}")


def publishable(target: Path) -> tuple[Path, list[Path]]:
    """Return the folder of a run's adapter, of an adapter or of a merged model, with all its files.

    Raises:
        ConfigError: it is none of them, is private, or holds what no published folder has.
        IntegrityError: a file was added or changed since the folder was written.
    """
    is_merged = (target / "config.json").is_file() and not (target / "adapter").is_dir()
    folder = target if is_merged else find_adapter(target)[0]
    verify_manifest(folder)
    if not is_merged:
        check_trusted(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(folder).as_posix()
        if "/" in name or not any(fnmatch.fnmatchcase(name, pattern) for pattern in PUBLIC):
            raise ConfigError(f"{file}: not a file of a published adapter or merged model; nothing is sent")
    description = folder / DESCRIPTION
    if description.is_file() and json.loads(description.read_text()).get("private"):
        raise ConfigError(f"{folder} is private: made from one client's own text; it is not published")
    return folder, files
