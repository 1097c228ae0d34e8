"""A run or a published adapter, found in its folder."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedllm.adapters.base_delta import adapter_with_base_delta
from fedllm.adapters.folder import PublishedAdapter, save_adapter
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError, PolicyError
from fedllm.files import read_object
from fedllm.models.files import name_to_resolve, resolve_model
from fedllm.runs.checkpoint import newest_checkpoint, newest_round
from fedllm.runs.folder import CHECKPOINTS, RESULT, read_keys
from fedllm.site_policy import load_policy
from scripts.console import shown_path

PARTITION = "partition.json"  # how the rows of a run were dealt, in its folder


@dataclass(frozen=True)
class Found:
    """An adapter folder, the configuration of its run where known, and the clients whose losses the run has.

    `note` says of an unfinished run which round the adapter is of and how to go on, else it is "".
    """

    folder: Path
    config: RunConfig | None
    clients: list[str]
    note: str = ""


@contextmanager
def adapter_of(target: Path) -> Iterator[Found]:
    """Yield the adapter that `target` is or holds; of an unfinished run that of its newest checkpoint.

    Raises:
        ConfigError: there is neither an adapter nor a round of a run, or the run's configuration is damaged.
        CheckpointError: no checkpoint is intact.
        PolicyError: the run is not finished, and this machine takes signed adapters alone.
    """
    if not newest_round(target / CHECKPOINTS) or _status(target) == "completed":
        folder, config = find_adapter(target)
        yield Found(folder, config, trained_clients(folder.parent))
        return
    config, policy = _config_of(target), load_policy()
    if policy.adapters.signers:
        raise PolicyError(
            f"{target}: not finished, so not signed, as [adapters] signers of {policy.file} asks"
        )
    state, notes = newest_checkpoint(target / CHECKPOINTS)
    files = resolve_model(config.model.name)
    notes.append(f"not finished: the adapter of round {state.round_num}; to go on: {resume_command(target)}")
    with TemporaryDirectory() as scratch:  # nobody is to take it for the result
        folder = Path(scratch) / "adapter"
        save_adapter(
            folder,
            adapter_with_base_delta(state.adapter, state.base_delta),
            base_model=files.public_name,
            revision=files.revision,
            target_modules=["all-linear"],  # it is read back by its layout alone
            card="",
        )
        measured = next((record.held_out for record in reversed(state.records) if record.held_out), {})
        yield Found(folder, config, list(measured), "\n".join(notes))


def resume_command(target: Path) -> str:
    """Return the command line by which a run that is not finished goes on."""
    run = target.resolve()
    words = ["fedllm", "run", shown_path(run / "config.toml"), "--out", shown_path(run.parent), "--resume"]
    return shlex.join(words)


def find_adapter(target: Path) -> tuple[Path, RunConfig | None]:
    """Return the adapter folder that `target` is or holds, and the configuration of its run where known.

    Raises:
        ConfigError: there is neither an adapter nor a finished run, or the run's configuration is damaged.
    """
    folder = target / "adapter" if (target / "adapter").is_dir() else target
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{target}: neither a run with a complete round nor an adapter folder")
    if folder.name != "adapter" or not (folder.parent / "config.toml").is_file():
        return folder, None
    return folder, _config_of(folder.parent)


def _config_of(run: Path) -> RunConfig:
    try:
        return RunConfig.from_flat(read_keys(run))
    except ConfigError as error:
        raise ConfigError(f"{run}: a run of another version of fedllm, or a damaged one ({error})") from None


def _status(run: Path) -> str:
    """Return how the latest attempt at a run ended, "" where it left no word."""
    return str(read_object(run / RESULT).get("status", ""))


def bare_config(published: PublishedAdapter) -> RunConfig:
    """Return a configuration that loads the base model an adapter names."""
    return RunConfig.from_flat({"model.name": name_to_resolve(published.base_model, published.revision)})


def check_new(path: Path, option: str) -> None:
    """Refuse a file or folder to write that holds something already.

    Raises:
        ConfigError: it does.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{option} {path}: holds something already; name a new one")


def trained_clients(run: Path) -> list[str]:
    """Return the clients whose held-out losses a run recorded."""
    try:
        return list(json.loads((run / "result.json").read_text())["held_out"]["after"]["clients"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def own_rows(config: RunConfig) -> RunConfig:
    """Return the configuration without the canaries that a run plants for its audit: clients' rows alone."""
    return config.override({"audit.canaries": 0})
