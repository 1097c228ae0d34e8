"""`fedllm pipeline`: an adapter that is watched, trained on, judged, promoted and rolled back by itself."""

import time
from collections.abc import Sequence
from pathlib import Path

from clients.process import PROCESS
from fedllm.errors import ConfigError, FedLLMError
from fedllm.files import locked
from fedllm.identity import load_key
from fedllm.monitoring.open_metrics import write_metrics
from fedllm.plan.run_plan import resolve
from fedllm.registry.registry import Registry
from scripts.cli_options import AUDIT_EPOCHS, AUDIT_PREFIX, AUDIT_ROWS, AUDIT_SUFFIX
from scripts.command_line import StoppedError, again
from scripts.commands.audit_command import audit
from scripts.commands.run_command import do_run
from scripts.console import Console
from scripts.pipeline.metrics import pipeline_samples
from scripts.pipeline.settings import Settings, read_settings
from scripts.pipeline.steps import Pipeline, tick
from scripts.recipe_arguments import config_of


def pipeline(file: Path, *, once: bool) -> None:
    """Look at the clients and do what follows, once or again and again.

    Raises:
        FedLLMError: the file is wrong, or another process does this pipeline; with `once` also what a step
            cannot do now.
        StoppedError: a signal came; the next call goes on where this one was.
    """
    settings, console = read_settings(file), Console()
    wanted = open_pipeline(settings, console)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    with locked(wanted.folder / ".lock") as is_free:
        if not is_free:
            raise ConfigError(f"{wanted.folder}: another process does this pipeline")
        try:
            while not _is_done(wanted, console, once=once):
                time.sleep(60 * settings.trigger.look_minutes)
        except KeyboardInterrupt:
            raise StoppedError(f"stopped; go on with: {again()}") from None


def open_pipeline(settings: Settings, console: Console) -> Pipeline:
    """Return a pipeline whose runs are those of `fedllm run`, shown on `console`.

    Raises:
        ConfigError: the key cannot be read, the recipe is wrong or of a run whose server has no adapter, or
            a gate wants an audit and the rows are elsewhere.
    """
    recipe = settings.path(settings.run.recipe)
    plan = resolve(config_of([str(recipe)]))
    if plan.secure is not None and plan.secure.is_blind:
        raise ConfigError(f"{recipe}: with secure.method = shares the server has no adapter to judge")
    if settings.gates.is_audited and settings.run.runtime == "deployment":
        raise ConfigError(
            f"{settings.file}: the gates extraction and near-duplicates need the rows on this machine, which"
            " run.runtime = deployment has not"
        )

    def epsilon_of_run() -> float:
        privacy = resolve(config_of([str(recipe)])).privacy
        return privacy.epsilon if privacy else 0.0

    def federate(words: Sequence[str]) -> None:
        PROCESS.forget_rows()  # they may have changed since the run before
        do_run(config_of(words), settings.run.runtime, console)

    def memorised(folder: Path) -> None:
        audit(
            folder,
            rows=AUDIT_ROWS,
            prefix=AUDIT_PREFIX,
            suffix=AUDIT_SUFFIX,
            epochs=AUDIT_EPOCHS,
            plot=None,
            on_card=False,
            as_json=False,
        )

    return Pipeline(
        settings,
        Registry(settings.path(settings.registry.folder)),
        load_key(settings.path(settings.registry.key)),
        federate,
        memorised,
        time.time,
        console.line,
        epsilon_of_run,
    )


def _is_done(wanted: Pipeline, console: Console, *, once: bool) -> bool:
    """Do one tick; return whether it is the last. Where it fails, say so and let the next one try again."""
    try:
        state = tick(wanted)
        if named := wanted.settings.metrics.file:
            write_metrics(wanted.settings.path(named), pipeline_samples(wanted, state))
    except FedLLMError as error:
        if once:
            raise
        console.line(f"{error}; trying again in {wanted.settings.trigger.look_minutes:g} minutes")
    except OSError as error:
        where, why = error.filename or wanted.folder, error.strerror or "a copy failed"
        raise ConfigError(f"{where}: cannot be read or written ({why})") from None
    return once
