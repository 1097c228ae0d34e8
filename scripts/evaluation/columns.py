"""The targets of `fedllm evaluate` as columns: base models and adapters, each with its name."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clients.process import PROCESS
from fedllm.adapters.folder import PublishedAdapter, load_adapter
from fedllm.adapters.layout import AdapterLayout
from fedllm.config.keys import LoraConfig
from fedllm.config.run_config import RunConfig
from fedllm.engine.engine import Engine
from fedllm.errors import ConfigError, ModelError
from fedllm.models.base import layout_of
from fedllm.models.files import fingerprint, resolve_model
from scripts.finished_run import Found, adapter_of, bare_config

BASE = "base"


@dataclass(frozen=True, eq=False)
class Column:
    """A base model, alone or with an adapter [P] of a layout; `note` is what is to be said of it.

    `clients` are those whose losses the adapter's run has; None where `config` is not of its own run.
    """

    name: str
    config: RunConfig
    layout: AdapterLayout | None = None
    vector: torch.Tensor | None = None
    note: str = ""
    clients: tuple[str, ...] | None = None


def open_columns(targets: Sequence[str]) -> list[Column]:
    """Return the columns of targets, base models first: those named, and those that adapters stand on.

    A base model that is alone is called `base`, and an adapter by its folder, or by the whole target where
    two folders have one name.

    Raises:
        ConfigError: a target is neither a run, nor an adapter, nor a base model.
    """
    bases = {target: _open_base(target) for target in targets if not holds_adapter(target)}
    opened = {target: _load_adapter(target) for target in targets if holds_adapter(target)}
    # An adapter names its base model; where that is a folder, only another target says which one.
    known = {fingerprint(resolve_model(name).folder): base.config for name, base in bases.items()}
    known |= {one.state.layout.fingerprint: found.config for one, found in opened.values() if found.config}
    folders = Counter(map(_name_of, opened))
    adapters = []
    for target, (published, found) in opened.items():
        state, short = published.state, _name_of(target)
        config = found.config or known.get(state.layout.fingerprint) or bare_config(published)
        adapters.append(
            Column(
                short if folders[short] == 1 else target,
                config,
                state.layout,
                state.vector,
                found.note,
                tuple(found.clients) if found.config else None,
            )
        )
        bases.setdefault(config.model.name, Column(config.model.name, config))
    first = list(bases.values())
    return [replace(first[0], name=BASE) if len(first) == 1 else first[0], *first[1:], *adapters]


def by_engine(columns: Sequence[Column]) -> Iterator[tuple[Engine, dict[str, torch.Tensor]]]:
    """Yield an engine with the adapters [P] that it runs, until every column has been named.

    Adapters of one layout share an engine, and a base model goes with the first of its adapters.
    """
    left = list(columns)
    while left:
        chosen = next((one for one in left if one.layout is not None), left[0])
        model = chosen.config.model
        group = [one for one in left if one.config.model == model and one.layout in (None, chosen.layout)]
        left = [one for one in left if one not in group]
        engine = open_engine(chosen)
        nothing = torch.zeros(engine.layout.size)
        yield engine, {one.name: nothing if one.vector is None else one.vector for one in group}


def open_engine(column: Column) -> Engine:
    """Return the engine of a column; for a base model alone the smallest adapter stands."""
    config, layout = column.config, column.layout
    if layout is None:
        base = PROCESS.resident.base(config.model)
        layout = layout_of(base.model, LoraConfig(rank=1), base.fingerprint)
    return PROCESS.resident.engine(config.model, layout, config.train.token_budget)


def holds_adapter(target: str) -> bool:
    """Return whether a target is a run or an adapter rather than a base model."""
    folder = Path(target)
    if not folder.is_dir():
        return False
    return (folder / "adapter_config.json").is_file() or not (folder / "config.json").is_file()


def _load_adapter(target: str) -> tuple[PublishedAdapter, Found]:
    """Return an adapter, and what is known of its run."""
    with adapter_of(Path(target)) as found:
        return load_adapter(found.folder), found


def _name_of(target: str) -> str:
    folder = Path(target).resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def _open_base(target: str) -> Column:
    config = RunConfig.from_flat({"model.name": target})
    try:
        resolve_model(target)
    except ModelError as error:
        raise ConfigError(f"{target}: neither a run, an adapter nor a base model ({error})") from None
    return Column(target, config)
