"""A finished run or a published adapter, found in its folder."""

import json
from pathlib import Path

from fedllm.adapters.folder import PublishedAdapter
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.models.files import EMBEDDED_ALIAS, EMBEDDED_HUB_ID
from fedllm.runs.folder import read_keys

PARTITION = "partition.json"  # how the rows of a run were dealt, in its folder


def find_adapter(target: Path) -> tuple[Path, RunConfig | None]:
    """Return the adapter folder that `target` is or holds, and the configuration of its run where known.

    Raises:
        ConfigError: there is neither an adapter nor a finished run, or the run's configuration is damaged.
    """
    folder = target / "adapter" if (target / "adapter").is_dir() else target
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{target}: neither a finished run nor an adapter folder")
    if folder.name != "adapter" or not (folder.parent / "config.toml").is_file():
        return folder, None
    return folder, RunConfig.from_flat(read_keys(folder.parent))


def bare_config(published: PublishedAdapter) -> RunConfig:
    """Return a configuration that loads the base model an adapter names."""
    name = EMBEDDED_ALIAS if published.base_model == EMBEDDED_HUB_ID else published.base_model
    return RunConfig.from_flat({"model.name": f"{name}@{published.revision}" if published.revision else name})


def trained_clients(run: Path) -> list[str]:
    """Return the clients whose held-out losses a run recorded."""
    try:
        return list(json.loads((run / "result.json").read_text())["held_out"]["after"]["clients"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def own_rows(config: RunConfig) -> RunConfig:
    """Return the configuration without the canaries that a run plants for its audit: clients' rows alone."""
    return config.override({"audit.canaries": 0})
