"""From a finished run to a new one whose adapter has unlearnt a client approximately (class D)."""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from clients.client_app import app
from clients.process import PROCESS
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import newest_checkpoint, save_checkpoint
from fedllm.runs.folder import (
    CHECKPOINTS,
    describe_run,
    open_run_folder,
    read_keys,
    read_left_out,
    run_folder,
    write_left_out,
    write_rounds,
)
from fedllm.runs.lineage import adapter_digest, note_clients, noted_clients
from fedllm.runs.unlearning import Unlearning, clear_unfinished, write_unlearning
from scripts.runtimes.local import local_grid, node_config_of
from scripts.unlearning.approximate import Case, forget, kept_states
from scripts.unlearning.carried import carry_private
from scripts.unlearning.verify import verify
from strategies.publish import publish_run
from strategies.start import open_session
from strategies.unlearning.measured import with_adapter


def unlearn_approximately(
    run: Path, client: str, method: str, name: str, reason: str = "", *, seeds: Sequence[int] = ()
) -> Path:
    """Forget a client of the finished run in the folder `run`; return that of the new run `name` next to it.

    `reason` says why no stronger class of unlearning was possible. With `seeds` the method is verified first,
    on runs of the same recipe.

    Raises:
        ConfigError: the run has no such client, cannot be unlearnt so, there are too few seeds, or `name` is
            taken.
        FedLLMError: the rows or the base model are not on this machine.
    """
    config = RunConfig.from_flat(read_keys(run)).override({"run.output": str(run.resolve().parent)})
    holder = PROCESS.open(config.to_flat(), node_config_of(config))
    if client not in holder.clients:
        raise ConfigError(
            f"{run}: no rows of a client {client!r} are on this machine; forget it where they are"
        )
    began = time.perf_counter()
    checkpoints = run / CHECKPOINTS
    if method == "subtraction":
        case = Case(holder, client, kept_states(checkpoints, holder.initial))
    else:  # which needs the finished adapter alone
        case = Case(holder, client, (newest_checkpoint(checkpoints)[0],))
    adapter = forget(case, method)
    seconds = time.perf_counter() - began
    verification: dict[str, str] = {}
    if seeds:
        with TemporaryDirectory() as scratch:  # where those runs keep the secrets of their canaries
            verdicts = verify(config.override({"run.output": scratch}), client, method, seeds)
        verification = {measure: verdict.in_words for measure, verdict in verdicts.items()}
    new, parent = config.override({"run.name": name, "run.resume": False}), adapter_digest(run / "adapter")
    clear_unfinished(run_folder(new), parent)
    with open_run_folder(new) as folder:
        write_left_out(folder, {*read_left_out(run), client})  # nobody asks it again, nor after a resume
        carry_private(run, config.run.name, folder, name)
        unlearning = Unlearning(
            kind="D",
            method=method,
            parent=parent,
            reason=reason,
            seconds=seconds,
            verification=verification,
        )
        write_unlearning(folder, unlearning)  # before the adapter is published: its card says it
        note_clients(folder, noted_clients(run))  # all of them, as nothing is guaranteed
        describe_run(folder, new)
        plan = resolve(new)
        session = open_session(plan, local_grid(new, app), folder=folder, resident=PROCESS.resident)
        state = with_adapter(session, case.final, adapter)
        save_checkpoint(folder / CHECKPOINTS, state, new.to_flat())
        write_rounds(folder, state.records)
        publish_run(folder, plan, state, "", session.clients)
    return folder
