"""A study in its folder: each finished cell is a line of `cells.jsonl`, the whole is `study.json`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import fedllm
from clients.process import PROCESS
from fedllm.errors import ConfigError
from fedllm.files import locked, write_file
from fedllm.models.files import fingerprint
from scripts.command_line import StoppedError, again
from scripts.console import in_time
from scripts.studies.cells import Study, do_study, possible_trials
from scripts.studies.cost import Cost, cost_of, jobs_for
from scripts.studies.held_out import open_clients
from scripts.studies.methods import KINDS
from scripts.studies.summary import Summary, study_json
from scripts.studies.trials import Setting, TrialRunner, open_pool, read_journal

STUDY, CELLS = "study.json", "cells.jsonl"


def do_in(folder: Path, study: Study, jobs: int, notice: Callable[[str], None]) -> Summary:
    """Do a study, going on with the cells that its folder has, and return its `study.json`.

    `jobs` cells are done at once, 0 = as many as this machine has room for.

    Raises:
        StoppedError: a signal came; finished cells are kept.
        ConfigError: another process does a study there, or the folder cannot be written.
        FedLLMError: the data or the model cannot be used.
    """
    clients = open_clients(study.config)
    cost = cost_of(study, clients)
    jobs = jobs or jobs_for(cost, study.config)
    digest = PROCESS.read_source(study.config).partition.digest  # of what the rows say
    model, source = study.config.model.name, study.config.data.source
    setting = Setting(model, source, study.flat, f"{fingerprint(clients.holder.files.folder)} {digest}")
    notice(f"{study.name}: {_in_words(study, cost, jobs, _num_kept(study, setting, folder / CELLS))}")
    if jobs > 1:
        PROCESS.release()  # each process of the pool loads its own
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".study.lock") as is_free:
            if not is_free:
                raise ConfigError(f"{folder}: another process is doing a study there; name another --out")
            with open_pool(jobs, max(1, (os.cpu_count() or 1) // jobs)) as pool:
                do = TrialRunner(setting, KINDS, folder / CELLS, fedllm.__version__, pool, notice)
                result = study_json(study, do_study(study, do))
        write_file(folder / STUDY, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}; name another --out") from None
    except KeyboardInterrupt:
        kept = len(read_journal(folder / CELLS))
        raise StoppedError(f"stopped; {kept} finished cells are kept; go on with: {again()}") from None
    return result


def _num_kept(study: Study, setting: Setting, journal: Path) -> int:
    """Return how many cells of a study its folder has already; a changed recipe's cells are others."""
    kept = read_journal(journal)
    return sum(setting.key(trial) in kept for trial in possible_trials(study))


def _in_words(study: Study, cost: Cost, jobs: int, num_kept: int) -> str:
    """Return what a study is about to do: its cells, and the time of those that are not done yet."""
    left = max(0, cost.cells - num_kept)
    done = f", {num_kept} of them done already" if num_kept else ""
    time = f", {jobs} at once, about {in_time(cost.seconds * left / cost.cells / jobs)}" if left else ""
    return (
        f"{', '.join(study.methods)}; {len(study.rates)} rates with the first of {len(study.seeds)} seeds:"
        f" {cost.cells} cells of up to {cost.tokens:,.0f} tokens{done}{time}"
    )
