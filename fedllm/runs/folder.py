"""The run folder: everything a run leaves behind, and nothing a client would not want there.

runs/NAME/.*.lock           held by the processes that do the run; free whenever none lives
runs/NAME/start/            the PEFT folder that it starts from, where one was put there before it began
runs/NAME/config.toml       the resolved configuration; a recipe that repeats the run
runs/NAME/environment.json  what it ran on: versions, type of the weights, device
runs/NAME/partition.json    which rows each client had, with a hash (written by `fedllm run`)
runs/NAME/rounds.jsonl      one record a round
runs/NAME/decisions.jsonl   what answered and what was decided (strategies/decisions.py)
runs/NAME/checkpoints/      the newest two, and a few from which the run can forget a client
runs/NAME/groups.json       the clients of each group, where they train in groups; the runs are in groups/
runs/NAME/left-out.json     clients that the run goes on without (docs/unlearning.md)
runs/NAME/tracking.json     what each tracker calls the run, and the last round it was sent (docs/tracking.md)
runs/NAME/adapter/          the published PEFT folder
runs/NAME/lineage.json      how it came about, for its statement (docs/signing.md); has clients' names
runs/NAME/privacy.json      what may be said of its privacy, under a privacy plan (docs/privacy.md)
runs/NAME/withdrawals/      what sites have signed that withdrew meanwhile (docs/withdrawal.md)
runs/NAME/private/          what clients of this machine keep for themselves, such as personal adapters; in
                            server/ the noise secret and the ledger of a private run
runs/NAME/audit.json        what attacks found, written by `fedllm audit` (docs/audit.md); not for publication
runs/NAME/evaluation.json   what `fedllm evaluate` found (docs/evaluation.md)
runs/NAME/unlearning.json   what this run's adapter has unlearnt, and with what guarantee (docs/unlearning.md)
runs/NAME/report.html       all of it on one page, for a browser (docs/report.md)
runs/NAME/result.json       held-out loss and answers before and after, and how the run ended
"""

import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedllm.config.key import Scalar
from fedllm.config.keys import ModelConfig
from fedllm.config.recipe import read_recipe
from fedllm.config.run_config import RunConfig
from fedllm.errors import CheckpointError, ConfigError
from fedllm.files import locked, remove_unfinished, write_file
from fedllm.models.base import how_held
from fedllm.plan.run_plan import fixed_keys
from fedllm.runs.checkpoint import check_resumable, newest_round
from fedllm.runs.records import RoundRecord, record_from_dict, record_to_line

DECISIONS, TRACKING, WITHDRAWALS = "decisions.jsonl", "tracking.json", "withdrawals"
START, ROUNDS, CHECKPOINTS, RESULT = "start", "rounds.jsonl", "checkpoints", "result.json"
LEFT_OUT, GROUPS = "left-out.json", "groups.json"
WRITER, STARTER = ".writer.lock", ".starter.lock"
_REPORTED = ("fedllm", "flwr", "ray", "torch", "transformers", "peft", "datasets", "tokenizers")


def run_folder(config: RunConfig) -> Path:
    """Return the folder of a run: `run.output` (./runs where empty) / `run.name`, absolute."""
    return (Path(os.path.expanduser(config.run.output or "runs")) / config.run.name).resolve()


@contextmanager
def open_run_folder(config: RunConfig, lock: str = WRITER) -> Iterator[Path]:
    """Create the folder of a run, or open it to continue the run in it; hold it for the block.

    `WRITER` is held by the process that does the rounds, in each runtime. `STARTER` is held by a command
    around that process, which may be another one; it is refused as well while somebody does rounds.

    Raises:
        ConfigError: it cannot be written, another process holds it, or it has an earlier run that is not to
            be continued, or not with these keys.
    """
    folder = run_folder(config)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_free = stack.enter_context(locked(folder / lock))
            # Not where it is refused anyway: the process that the lock's holder starts may open it just then.
            if is_free and lock != WRITER:
                with locked(folder / WRITER) as is_free:
                    pass
        except OSError as error:
            raise ConfigError(f"cannot write {folder}: {error.strerror}; set run.output") from None
        if not is_free:
            raise ConfigError(
                f"{folder}: another process is doing this run; wait until it ends, or choose another run.name"
            )
        _check_earlier(folder, config)
        if lock == WRITER:
            for written in (folder, folder / CHECKPOINTS, folder / "private" / "server"):
                remove_unfinished(written)  # what an attempt left that was killed
        yield folder


def _check_earlier(folder: Path, config: RunConfig) -> None:
    """Refuse a folder whose earlier run is not to be continued; a run without a complete round is none."""
    if not newest_round(folder / CHECKPOINTS):
        if (folder / "adapter").exists():
            raise ConfigError(
                f"{folder} holds an adapter and no checkpoint to go on from; choose another run.name"
            )
    elif config.run.resume:
        check_resumable(folder / CHECKPOINTS, fixed_keys(config))
    else:
        raise ConfigError(
            f"{folder} holds an earlier run: add --resume to continue it, or choose another run.name"
        )


def describe_run(folder: Path, config: RunConfig) -> None:
    """Write configuration and environment, once it is certain that the run goes on with them."""
    write_file(folder / "config.toml", to_toml(config))
    write_file(folder / "environment.json", json.dumps(environment(config.model), indent=1) + "\n")


def read_keys(folder: Path) -> dict[str, Scalar]:
    """Return the flat keys of the configuration that `describe_run` wrote.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    try:
        return read_recipe(folder / "config.toml")
    except ConfigError as error:
        raise ConfigError(f"{folder}: not a run folder ({error})") from None


def write_rounds(folder: Path, records: Sequence[RoundRecord]) -> None:
    """Write `rounds.jsonl` whole, so that a resumed run repeats no line."""
    write_file(folder / ROUNDS, "".join(record_to_line(record) + "\n" for record in records))


def read_rounds(folder: Path) -> list[RoundRecord]:
    """Return the records that `write_rounds` wrote.

    Raises:
        ConfigError: there are none, or they are damaged.
    """
    try:
        lines = (folder / ROUNDS).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: not a run folder ({ROUNDS}: {type(error).__name__})") from None
    if not lines:
        raise ConfigError(f"{folder}: not a run folder ({ROUNDS} is empty)")
    return [read_round(folder, line) for line in lines]


def read_round(folder: Path, line: str) -> RoundRecord:
    """Return the record in one line of `rounds.jsonl`.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return record_from_dict(json.loads(line))
    except CheckpointError as error:
        raise ConfigError(f"{folder / ROUNDS}: {error}") from None
    except ValueError:
        raise ConfigError(f"{folder / ROUNDS}: damaged; a run that goes on writes it again") from None


def write_left_out(folder: Path, clients: Iterable[str]) -> None:
    """Name the clients that the run of a folder goes on without, before it begins.

    Raises:
        ConfigError: it was begun without others: some of `clients` may have trained in it.
    """
    if (folder / LEFT_OUT).exists() and read_left_out(folder) != {*(clients := [*clients])}:
        raise ConfigError(f"{folder}: was begun without other clients; choose another name")
    write_file(folder / LEFT_OUT, json.dumps(sorted(clients)) + "\n")


def read_left_out(folder: Path) -> frozenset[str]:
    """Return the clients that `write_left_out` named, none where there is no such file.

    Raises:
        ConfigError: the file is damaged: to go on might train a client that is to be forgotten.
    """
    try:
        return frozenset(map(str, json.loads((folder / LEFT_OUT).read_text())))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{folder / LEFT_OUT}: no list of clients ({type(error).__name__}); restore it"
        ) from None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json`, the last thing a run does."""
    write_file(folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def to_toml(config: RunConfig) -> str:
    """Return the configuration as a TOML recipe."""
    import tomli_w

    nested: dict[str, Any] = {}
    for key, value in config.to_flat().items():
        section, _, leaf = key.partition(".")
        if leaf:
            nested.setdefault(section, {})[leaf] = value
        else:
            nested[section] = value
    return tomli_w.dumps(nested)


def environment(model: ModelConfig) -> dict[str, str]:
    """Return what a result depends on: versions, and how the model is held here; no host, user or path."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _REPORTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found | how_held(model)
