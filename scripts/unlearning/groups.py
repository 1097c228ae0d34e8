"""Runs whose clients train in groups, an adapter each, and forgetting a client by training one group again.

RUN/groups.json   the number of groups, and the clients of each
RUN/groups/G/     the run of group G, without the clients of all others
RUN/adapter/      the mean of the groups' adapters
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clients.client_app import app
from clients.process import PROCESS
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.files import write_file
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import newest_checkpoint, save_checkpoint
from fedllm.runs.folder import (
    CHECKPOINTS,
    GROUPS,
    describe_run,
    open_run_folder,
    read_keys,
    run_folder,
    write_left_out,
    write_rounds,
)
from fedllm.runs.lineage import adapter_digest
from fedllm.runs.unlearning import Unlearning, clear_unfinished, write_unlearning
from scripts.runtimes.local import local_grid
from scripts.unlearning.carried import carry_private
from strategies.first_state import first_state
from strategies.publish import publish_run
from strategies.run import run_federation
from strategies.start import open_session
from strategies.unlearning.groups import group_in_folder, in_groups, mean_of_groups, read_groups
from strategies.unlearning.measured import with_adapter

Groups = Mapping[int, Sequence[str]]  # the clients of each


def run_groups(config: RunConfig, number: int, notice: Callable[[str], None] = lambda line: None) -> Path:
    """Do a run of `number` groups on this machine and return its folder; empty groups are left out.

    A run that was stopped goes on: a group that is done is not done again.

    Raises:
        ConfigError: the recipe has no single adapter for a group, or its folder is taken.
        FedLLMError: a group's run cannot start or go on.
    """
    _check(config)
    shards = PROCESS.read_source(config)
    groups = in_groups((client.client_id for client in shards.clients), number, config.seed)
    with open_run_folder(config) as folder:
        for group, clients in groups.items():
            notice(f"group {group}: {', '.join(clients)}")
            _run_group(config, folder, groups, group)
        _publish(config, folder, groups)
    return folder


def redo_group(run: Path, client: str, name: str, reason: str = "") -> Path:
    """Forget a client of a run of groups; return the folder of the new run `name` next to it.

    Raises:
        ConfigError: the folder holds no run of groups with this client, or `name` is taken.
        FedLLMError: the group cannot be trained again.
    """
    config = RunConfig.from_flat(read_keys(run)).override({"run.output": str(run.resolve().parent)})
    before = read_groups(run)
    group = group_in_folder(run, client)
    groups = {one: [name for name in clients if name != client] for one, clients in before.items()}
    groups = {one: clients for one, clients in groups.items() if clients}
    began, new = time.perf_counter(), config.override({"run.name": name, "run.resume": False})
    parent = adapter_digest(run / "adapter")
    clear_unfinished(run_folder(new), parent)
    with open_run_folder(new) as folder:
        for one in groups:
            if one != group:
                # A call that was killed may have copied a part of it.
                shutil.copytree(run / "groups" / str(one), folder / "groups" / str(one), dirs_exist_ok=True)
        if group in groups:  # else the client was alone in it
            place = Path("groups", str(group))
            carry_private(run / place, str(group), folder / place, str(group))
            _run_group(new, folder, groups, group)
        unlearning = Unlearning(
            kind="C",
            method="group",
            parent=parent,
            reason=reason,
            rounds=config.federation.num_rounds if group in groups else 0,
            seconds=time.perf_counter() - began,
        )
        write_unlearning(folder, unlearning)  # before the adapter is published: its card says it
        _publish(new, folder, groups)
    return folder


def _check(config: RunConfig) -> None:
    """Refuse recipes whose groups have no single adapter of one rank."""
    plan = resolve(config)
    if plan.privacy is not None or plan.secure is not None:
        raise ConfigError("groups of clients go with no privacy budget and no secret sums: each is too small")
    if plan.aggregation.read_out in {"residual", "stack", "local-b"} or plan.personal is not None:
        raise ConfigError(
            "groups of clients need one shared adapter of lora.rank each; set aggregation.read-out = svd and"
            " personal.mode = none"
        )


def _run_group(config: RunConfig, folder: Path, groups: Groups, group: int) -> None:
    """Do the run of one group, which starts where all do."""
    place = {"run.output": str(folder / "groups"), "run.name": str(group)}
    own = config.override({**place, "run.resume": True})
    inside = set(groups[group])
    everybody = {client.client_id for client in PROCESS.read_source(config).clients}
    (folder / "groups" / str(group)).mkdir(parents=True, exist_ok=True)
    write_left_out(folder / "groups" / str(group), everybody - inside)
    run_federation(own, local_grid(own, app), resident=PROCESS.resident)


def _publish(config: RunConfig, folder: Path, groups: Groups) -> None:
    """Write the groups, and what a finished run leaves: the mean of their adapters, measured."""
    write_file(folder / GROUPS, json.dumps(groups, indent=1) + "\n")
    inside = {client for clients in groups.values() for client in clients}
    everybody = {client.client_id for client in PROCESS.read_source(config).clients}
    if everybody - inside:
        write_left_out(folder, everybody - inside)
    describe_run(folder, config)
    plan = resolve(config)
    session = open_session(plan, local_grid(config, app), folder=folder, resident=PROCESS.resident)
    finals = [newest_checkpoint(folder / "groups" / str(group) / CHECKPOINTS)[0] for group in groups]
    adapter = mean_of_groups([one.adapter for one in finals], [*map(len, groups.values())])
    base, last = first_state(session), config.federation.num_rounds
    records = (*base.records, replace(base.records[0], round_num=last))
    state = with_adapter(session, replace(base, round_num=last, records=records), adapter)
    save_checkpoint(folder / CHECKPOINTS, state, config.to_flat())
    write_rounds(folder, state.records)
    publish_run(folder, plan, state, "", session.clients)
