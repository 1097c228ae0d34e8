"""`fedllm unlearn`: a run forgets a client, or some rows, by the strongest class that it allows."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clients.forgotten import forget_rows
from clients.process import PROCESS
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Example
from fedllm.data.shards import load_one_client
from fedllm.errors import CheckpointError, ConfigError
from fedllm.plan.dealt_numbers import parse_canaries
from fedllm.runs.folder import read_keys
from fedllm.runs.unlearning import read_unlearning
from scripts.commands.run_command import do_run
from scripts.console import Console, shown_path
from scripts.unlearning.carried import carry_private
from scripts.unlearning.groups import redo_group
from scripts.unlearning.new_run import unlearn_approximately
from strategies.unlearning.guarantee import Guarantee, guarantee_of
from strategies.unlearning.replay import begin_replay, replayed_config


@dataclass(frozen=True)
class Wanted:
    """The run that is to forget, the name of the new one and how that is done."""

    run: Path
    name: str
    runtime: str = "local"
    method: str = "ascent"  # of class D
    num_seeds: int = 0  # with which class D is compared with retraining
    is_prepared: bool = False  # the rounds of class A are left to `fedllm serve`


def unlearn(
    wanted: Wanted, *, client: str, rows: Path | None, rows_gone: bool, is_only_told: bool, as_json: bool
) -> None:
    """Say which class a run allows and why, and unless `is_only_told` do what it takes.

    With `rows_gone` the client stays, and its machine has forgotten rows of it (`fedllm site forget`).

    Raises:
        FedLLMError: the run cannot be read, knows neither client nor rows, or cannot be done again.
    """
    if bool(client) == bool(rows) or (rows_gone and rows):
        raise ConfigError("name either the --client to forget, or a file with the --rows")
    config, console = RunConfig.from_flat(read_keys(wanted.run)), Console(quiet=as_json)
    examples, are_rows = rows_in(rows, config) if rows else (), bool(rows) or rows_gone
    # Rows may have several owners: what holds of all of them is the weakest guarantee.
    owners = owners_of(examples, config) if rows else [client]
    found = {owner: guarantee_of(wanted.run, owner, rows=are_rows) for owner in owners}
    client, guarantee = max(found.items(), key=lambda item: (item[1].kind, item[1].num_again))
    if wanted.is_prepared and guarantee.first_round > 1 and parse_canaries(config.audit.canaries)[0]:
        why = "sites plant other canaries in a run of another name"
        guarantee = replace(guarantee, first_round=1, why=why)
    for line in lines_of(guarantee):
        console.line(line)
    if are_rows and guarantee.kind in "CD":
        raise ConfigError(
            f"{wanted.run}: single rows cannot be forgotten; forget the --client {client} instead"
        )
    folder, reason = None, "; ".join(f"not {kind}: {why}" for kind, why in guarantee.refused.items())
    if is_only_told or not guarantee.needs_work:
        pass
    elif guarantee.kind == "A":
        folder = _prepared(wanted, client, guarantee, examples, are_rows=are_rows)
        _go_on(wanted, folder, console)
    elif guarantee.kind == "C":
        folder = redo_group(wanted.run, client, wanted.name, reason)
    else:
        seeds = range(config.seed, config.seed + wanted.num_seeds)
        folder = unlearn_approximately(wanted.run, client, wanted.method, wanted.name, reason, seeds=seeds)
    if folder and not wanted.is_prepared:
        if (unlearning := read_unlearning(folder)) is not None:
            console.line(unlearning.guarantee)
        was, now = shown_path(wanted.run), shown_path(folder)
        console.line(f"{now} has unlearnt it; {was} has not: remove that in time")
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
        "B": "forgotten as far as the run was private; nothing to do",
        "C": "the bits of groups without it; one group again",
        "D": "approximate, without any guarantee",
    }
    first = f"class {guarantee.kind}: {costs[guarantee.kind]} ({guarantee.why})"
    reasons = [f"  not class {kind}: {why}" for kind, why in guarantee.refused.items()]
    return [first, *reasons, *([f"  the earlier run: {guarantee.earlier}"] if guarantee.earlier else [])]


def _prepared(
    wanted: Wanted, client: str, guarantee: Guarantee, examples: tuple[Example, ...], *, are_rows: bool
) -> Path:
    """Write the folder of a run that does rounds again without a client, or without these rows of it."""
    if examples and (wanted.runtime == "simulation" or wanted.is_prepared):
        raise ConfigError("--rows: only clients of this machine can leave them out; use --runtime local")
    folder = begin_replay(wanted.run, client, guarantee, wanted.name, rows=are_rows, examples=examples)
    try:
        carry_private(wanted.run, RunConfig.from_flat(read_keys(wanted.run)).run.name, folder, wanted.name)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); free space") from None
    if examples:
        forget_rows(folder / "private", examples)
    return folder


def _go_on(wanted: Wanted, folder: Path, console: Console) -> None:
    """Do the rounds of a prepared run, or say how its server does them."""
    if wanted.is_prepared:
        recipe, output = shown_path(wanted.run / "config.toml"), shown_path(folder.parent)
        words = ["fedllm", "serve", recipe, f"run.name={wanted.name}", "--out", output]
        console.line(f"to do its rounds: {shlex.join(words)}")
        return
    folder, result = do_run(replayed_config(wanted.run, wanted.name), wanted.runtime, console)
    console.summary(folder, result)
