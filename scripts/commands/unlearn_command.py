"""`fedllm unlearn`: a run forgets a client, or some rows, by the strongest class that it allows."""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from clients.forgotten import forget_rows
from clients.process import PROCESS
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Example
from fedllm.data.shards import load_one_client
from fedllm.errors import CheckpointError, ConfigError
from fedllm.runs.folder import read_keys
from fedllm.runs.unlearning import read_unlearning
from scripts.commands.run_command import do_run
from scripts.console import Console, shown_path
from scripts.unlearning.carried import carry_private
from scripts.unlearning.groups import redo_group
from scripts.unlearning.new_run import unlearn_approximately
from strategies.unlearning.guarantee import Guarantee, guarantee_of
from strategies.unlearning.replay import begin_replay, replayed_config


def unlearn(
    run: Path,
    *,
    client: str,
    rows: Path | None,
    name: str,
    runtime: str,
    method: str,
    num_seeds: int,
    is_only_told: bool,
    as_json: bool,
) -> None:
    """Say which class a run allows and why, and unless `is_only_told` do what it takes.

    Raises:
        FedLLMError: the run cannot be read, knows neither client nor rows, or cannot be done again.
    """
    if bool(client) == bool(rows):
        raise ConfigError("name either the --client to forget, or a file with the --rows")
    config, console = RunConfig.from_flat(read_keys(run)), Console(quiet=as_json)
    examples = rows_in(rows, config) if rows else ()
    # Rows may have several owners: what holds of all of them is the weakest guarantee.
    owners = owners_of(examples, config) if rows else [client]
    found = {owner: guarantee_of(run, owner, rows=bool(rows)) for owner in owners}
    client, guarantee = max(found.items(), key=lambda item: (item[1].kind, item[1].num_again))
    for line in lines_of(guarantee):
        console.line(line)
    if rows and guarantee.kind in "CD":
        raise ConfigError(f"{run}: single rows cannot be forgotten; forget the --client {client} instead")
    folder, name = None, name or f"{run.resolve().name}-unlearned"
    reason = "; ".join(f"not {kind}: {why}" for kind, why in guarantee.refused.items())
    if is_only_told or not guarantee.needs_work:
        pass
    elif guarantee.kind == "A":
        folder = _replay(run, client, guarantee, name, examples, runtime, console)
    elif guarantee.kind == "C":
        folder = redo_group(run, client, name, reason)
    else:
        seeds = range(config.seed, config.seed + num_seeds)
        folder = unlearn_approximately(run, client, method, name, reason, seeds=seeds)
    if folder:
        if (unlearning := read_unlearning(folder)) is not None:
            console.line(unlearning.guarantee)
        console.line(f"{shown_path(folder)} has unlearnt it; {shown_path(run)} has not: remove that in time")
    if as_json:
        print(json.dumps({**asdict(guarantee), "folder": str(folder) if folder else None}))


def rows_in(file: Path, config: RunConfig) -> tuple[Example, ...]:
    """Return the rows of a file as a run with these columns reads them."""
    data = replace(config.data, held_out_fraction=0.0, max_rows="all")
    return load_one_client(file, data, client_id="rows", seed=0).client.train


def owners_of(examples: Iterable[Example], config: RunConfig) -> list[str]:
    """Return the clients of a run's source, on this machine, that have any of some rows.

    Raises:
        ConfigError: none has.
    """
    wanted, clients = set(examples), PROCESS.read_source(config).clients
    owners = [each.client_id for each in clients if wanted.intersection(each.train + each.held_out)]
    if not owners:
        raise ConfigError(f"no client of {config.data.source} has any of these rows")
    return owners


def lines_of(guarantee: Guarantee) -> list[str]:
    """Return what a person reads of a guarantee: the class, what it costs, and why none is stronger."""
    costs = {
        "A": f"the bits of a run without it; {guarantee.num_again} of {guarantee.num_rounds} rounds again",
        "B": f"forgotten up to epsilon {guarantee.epsilon or 0:.3g}; nothing to do",
        "C": "the bits of groups without it; one group again",
        "D": "approximate, without any guarantee",
    }
    first = f"class {guarantee.kind}: {costs[guarantee.kind]} ({guarantee.why})"
    return [first, *(f"  not class {kind}: {why}" for kind, why in guarantee.refused.items())]


def _replay(
    run: Path,
    client: str,
    guarantee: Guarantee,
    name: str,
    examples: tuple[Example, ...],
    runtime: str,
    console: Console,
) -> Path:
    """Do the rounds again that may have seen a client, in a new run; with `examples` it leaves out these."""
    if examples and runtime == "simulation":
        raise ConfigError("--runtime simulation: its workers cannot leave out single rows; use local")
    folder = begin_replay(run, client, guarantee, name, rows=bool(examples))
    try:
        carry_private(run, RunConfig.from_flat(read_keys(run)).run.name, folder, name)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); free space") from None
    if examples:
        forget_rows(folder / "private", examples)
    folder, result = do_run(replayed_config(run, name), runtime, console)
    console.summary(folder, result)
    return folder
