"""`fedllm run`: one federation in the runtime the person chose, watched live, summed up at the end."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clients.client_app import app
from clients.lost_rows import RowCounts, describe
from clients.process import PROCESS
from fedllm.config.run_config import RunConfig
from fedllm.data.partition import changed_clients, load_partition, save_partition
from fedllm.errors import ConfigError, FedLLMError
from fedllm.models.files import needs_conversion
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import newest_round
from fedllm.runs.folder import CHECKPOINTS, RESULT, STARTER, open_run_folder, run_folder, write_result
from scripts.answers import compare_answers
from scripts.console import Console
from scripts.finished_run import PARTITION, own_rows
from scripts.recipe_arguments import config_of
from scripts.reporting.page import reported
from scripts.run_view import RunView
from scripts.runtimes.local import node_config_of
from scripts.stopped_run import complete_rounds, told_how_to_go_on
from strategies.publish import keep_answers
from strategies.trackers import tracker_names

RUNTIMES = ("local", "simulation", "deployment")


def run(
    words: Sequence[str], *, runtime: str, resume: bool, out: Path | None, on_bad_row: str, as_json: bool
) -> None:
    """Run the federation that `words` describe and print what it gave."""
    extra = [f"run.resume={str(resume).lower()}"]
    extra += [f"run.output={out}"] if out else []
    extra += [f"data.on-bad-row={on_bad_row}"] if on_bad_row else []
    console, config = Console(quiet=as_json), config_of(words, extra)
    with told_how_to_go_on(run_folder(config), "--resume"):
        folder, result = do_run(config, runtime, console)
    if as_json:
        print(json.dumps(result))
    else:
        console.summary(folder, result)


def run_in_groups(
    words: Sequence[str], number: int, *, runtime: str, out: Path | None, as_json: bool
) -> None:
    """Train the clients in groups, so that one can be forgotten by training its group again.

    The same command goes on with a run that was stopped.

    Raises:
        ConfigError: the clients are elsewhere, so that nobody can deal them to groups before they join.
    """
    from scripts.unlearning.groups import run_groups

    if runtime != "local":
        raise ConfigError(f"--groups goes with --runtime local, not {runtime}: groups are dealt here")
    console = Console(quiet=as_json)
    folder = run_groups(config_of(words, [f"run.output={out}"] if out else []), number, console.line)
    result = json.loads((folder / RESULT).read_text())
    if as_json:
        print(json.dumps(result))
    else:
        console.summary(folder, result)


def do_run(config: RunConfig, runtime: str, console: Console) -> tuple[Path, dict[str, Any]]:
    """Do a run, shown on `console`, and return its folder and what came of it; a complete one is as it was.

    Raises:
        FedLLMError: it cannot start, or ended without a result.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"--runtime {runtime}: expected one of {', '.join(RUNTIMES)}")
    resolve(config)  # what the keys alone refuse comes before a folder is made
    tracker_names(config.track.to)  # and so does a package that is not there
    with open_run_folder(config, STARTER) as folder, reported(folder, console.line):
        told: list[str] = []
        with _logs_to(told.append):
            keep_partition(config)
        if config.run.resume and (rounds := complete_rounds(folder, config)):
            new = f"run.name={config.run.name}-2"
            console.line(f"{config.run.name}: complete after {rounds} rounds; {new} starts a new run")
        else:
            if needs_conversion(config.model.name):
                console.line("converting the model to safetensors, once, about half a minute ...")
            console.paragraph(_heading(config, runtime), indent=0)
            view = RunView(console, resolve(config))
            with view.showing(), _logs_to(view.notice):
                for line in told:
                    view.notice(line)
                run_in(runtime, config, view)
        result = json.loads((folder / RESULT).read_text())
        if "answers" not in result:  # a run shown once more keeps those it has
            result = keep_findings(config, runtime, folder)
    return folder, result


def keep_findings(config: RunConfig, runtime: str, folder: Path) -> dict[str, Any]:
    """Add to a complete run what this machine can find out about it: answers, and rows of no use.

    Returns its result, with the rows of no use also where the file must not have them.
    """
    keep_answers(folder, vars(compare_answers(config, folder / "adapter")))
    result: dict[str, Any] = json.loads((folder / RESULT).read_text()) | rows_lost(config, runtime)
    if resolve(config).privacy is None:  # else these counts, which have no noise, stay on the screen
        write_result(folder, result)
    return result


def _heading(config: RunConfig, runtime: str) -> str:
    federation, train = config.federation, config.train
    return (
        f"{config.run.name}: {config.model.name}, LoRA rank {config.lora.rank} on"
        f" {config.lora.target_modules}, {federation.num_clients} clients,"
        f" {federation.num_rounds} rounds of {train.local_steps} steps of {train.batch_size} rows,"
        f" {runtime} runtime"
    )


def run_in(runtime: str, config: RunConfig, view: RunView) -> None:
    """Do a run in one of `RUNTIMES`, shown by `view`.

    Raises:
        FedLLMError: it cannot start, or ended without a result.
    """
    if runtime == "local":
        from scripts.runtimes.local import local_grid
        from scripts.runtimes.machine import least_nodes
        from strategies.run import run_federation

        grid = local_grid(config, app, least_nodes(config))
        run_federation(config, grid, view.watch(), resident=PROCESS.resident)
    else:
        from scripts.runtimes.flower import run_with_flower

        run_with_flower(config, view, is_simulation=runtime == "simulation")


def rows_lost(config: RunConfig, runtime: str) -> dict[str, str]:
    """Return in a line, under "rows_lost", how many rows were of no use and why, where they are all here."""
    if runtime == "deployment":
        return {}
    try:
        with _logs_to(lambda _: None):  # the clients have said it already
            holder = PROCESS.open(own_rows(config).to_flat(), node_config_of(config))
        num_bad = len(PROCESS.read_source(config).bad)
    except FedLLMError:  # a run that is complete is resumed without its rows
        return {}
    bad = [f"{num_bad} bad rows skipped"] if num_bad else []
    others = describe(sum(holder.counts.values(), RowCounts()), config.train.max_length)
    told = "; ".join([*bad, *([others] if others else [])])
    return {"rows_lost": told} if told else {}


def keep_partition(config: RunConfig) -> None:
    """Save how the rows are dealt before a run begins; one with a complete round goes on only with the same.

    Raises:
        ConfigError: a run is to go on, and its clients no longer have the same rows.
    """
    partition, folder = PROCESS.read_source(config).partition, run_folder(config)
    saved = folder / PARTITION
    if newest_round(folder / CHECKPOINTS) and saved.exists():
        if changed := changed_clients(load_partition(saved), partition):
            names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise ConfigError(
                f"cannot resume: the rows of {names} are no longer those of {saved}; restore the data, or"
                " start anew under another run.name"
            )
    else:
        save_partition(saved, partition)


class _logs_to:
    """Show what the clients of this process log (skipped rows, truncation) as notices of the run."""

    def __init__(self, notice: Callable[[str], None]):
        self.handler = logging.Handler()
        self.handler.emit = lambda record: notice(record.getMessage())  # type: ignore[method-assign]

    def __enter__(self) -> None:
        logging.getLogger("fedllm").addHandler(self.handler)

    def __exit__(self, *unused: Any) -> None:
        logging.getLogger("fedllm").removeHandler(self.handler)
