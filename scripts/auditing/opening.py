"""Opening a finished run for its audit: adapter, base model and the rows of its clients, on their machine."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.data_holder import DataHolder
from clients.process import Process
from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import AdapterState
from fedllm.attacks.canaries import Canary
from fedllm.config.run_config import RunConfig
from fedllm.data.partition import Partition, load_partition
from fedllm.engine.engine import Engine
from fedllm.errors import ConfigError, DataError, NoDataError
from fedllm.models.chat import Encoded
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import read_rounds
from scripts.auditing.rows import planted_canaries, sampled, trained_rows
from scripts.finished_run import PARTITION, find_adapter, own_rows


@dataclass(frozen=True, eq=False)
class Case:
    """A run under audit.

    `holder` has the clients' own rows, without canaries, and a state folder of the audit's own: nothing that
    the run's clients keep is read or charged. `engine` is that of the published adapter, whose rank may be
    larger. `members` are rows that were trained on, `others` held-out ones. `statement` is the unit, trust,
    epsilon and delta of `privacy.json`, empty for a run without privacy.
    """

    folder: Path
    config: RunConfig
    holder: DataHolder
    adapter: AdapterState
    engine: Engine
    members: tuple[Encoded, ...]
    others: tuple[Encoded, ...]
    canaries: tuple[Canary, ...]
    statement: Mapping[str, Any]


def open_case(target: Path, *, max_rows: int, scratch: Path) -> Case:
    """Open a run folder; of members and of others `max_rows` are taken at most, drawn by the run's seed.

    Raises:
        ConfigError: there is no finished run, a file of it is damaged, or its adapter changes nothing alone.
        NoDataError, DataError: the rows of its clients are not on this machine, or no longer the same.
        LayoutError, ModelError: the base model on this machine is another one.
    """
    adapter_folder, config = find_adapter(target)
    if config is None:
        raise ConfigError(f"{target}: an adapter without its run; name the run folder, where its rows are")
    if resolve(config).aggregation.local_b:
        raise ConfigError(
            f"{target}: under aggregation.read-out = 'local-b' the published adapter changes nothing by"
            " itself, so there is nothing to audit in it"
        )
    folder = adapter_folder.parent
    published = load_adapter(adapter_folder, made_here=True)  # what is found here is signed with it later
    process = Process()
    engine = process.resident.engine(config.model, published.state.layout, config.train.token_budget)
    own = own_rows(config).override({"personal.mode": "none"})
    holder = process.open(own.to_flat(), {"server-paths": True, "state-path": str(scratch)})
    records = read_rounds(folder)
    trained = {client for record in records for client in record.accepted}
    _check_rows(folder, process.read_source(config).partition, trained, holder)
    canaries = planted_canaries(folder, config, holder)
    members = [
        row
        for client in holder.clients.values()
        for row in trained_rows(
            client, config, records, [c for c in canaries if c.client_id == client.client_id]
        )
    ]
    others = [row for client in holder.clients.values() for row in client.held_out]
    if not members or not others:
        raise NoDataError(
            f"{target}: an audit compares rows that were trained on with held-out ones, and this run has none"
            " of the latter; set data.held-out-fraction"
        )
    return Case(
        folder=folder,
        config=config,
        holder=holder,
        adapter=published.state,
        engine=engine,
        members=sampled(members, max_rows, config.seed, "members"),
        others=sampled(others, max_rows, config.seed, "others"),
        canaries=canaries,
        statement=_statement(folder),
    )


def _check_rows(folder: Path, partition: Partition, trained: Set[str], holder: DataHolder) -> None:
    """Refuse where this machine has other rows than the run trained on."""
    if not trained <= holder.clients.keys():
        raise NoDataError(
            f"{folder}: the run's clients keep their rows elsewhere; a data holder audits where its rows are"
        )
    saved = folder / PARTITION
    if saved.exists() and load_partition(saved) != partition:
        raise DataError(f"the rows are no longer those of {saved}; restore the data")


def _statement(folder: Path) -> Mapping[str, Any]:
    """Return what a run claims of its privacy; a damaged claim is not taken for none.

    Raises:
        ConfigError: privacy.json is damaged.
    """
    file = folder / "privacy.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        return {
            **{key: str(found[key]) for key in ("unit", "trust")},
            **{key: float(found[key]) for key in ("epsilon", "delta")},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged ({type(error).__name__}); restore it") from None
