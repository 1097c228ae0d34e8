"""`fedllm run`: one federation in the runtime the person chose, watched live, summed up at the end."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.client_app import app
from clients.process import PROCESS
from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.config.run_config import RunConfig
from fedllm.data.partition import load_partition, save_partition
from fedllm.errors import ConfigError
from fedllm.models.files import needs_conversion
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import open_run_folder, read_keys, run_folder
from scripts.console import Console
from scripts.finished_run import PARTITION
from scripts.recipe_arguments import config_of
from scripts.run_view import RunView
from strategies.publish import keep_answers

RUNTIMES = ("local", "simulation", "deployment")


@dataclass(frozen=True)
class Answers:
    """What the base model and the tuned one say to the same public prompts."""

    prompts: list[str]
    before: list[str]
    after: list[str]


def run(
    words: Sequence[str], *, runtime: str, resume: bool, out: Path | None, on_bad_row: str, as_json: bool
) -> None:
    """Run the federation that `words` describe and print what it gave."""
    extra = [f"run.resume={str(resume).lower()}"]
    extra += [f"run.output={out}"] if out else []
    extra += [f"data.on-bad-row={on_bad_row}"] if on_bad_row else []
    config = config_of(words, extra)
    if runtime not in RUNTIMES:
        raise ConfigError(f"--runtime {runtime}: expected one of {', '.join(RUNTIMES)}")
    console = Console(quiet=as_json)
    if needs_conversion(config.model.name):
        console.line("converting the model to safetensors, once, about half a minute ...")
    console.paragraph(_heading(config, runtime), indent=0)
    view = RunView(console, resolve(config))
    with view.showing(), _logs_to(view):
        run_in(runtime, config, view)
    folder = run_folder(config)
    answers = compare_answers(config, folder / "adapter")
    if answers.prompts:
        keep_answers(folder, vars(answers))
    result = json.loads((folder / "result.json").read_text())
    if as_json:
        print(json.dumps({"answers": vars(answers), **result}))
    else:
        console.summary(folder, result)


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
    _keep_partition(config)
    if runtime == "local":
        from scripts.runtimes.local import local_grid
        from strategies.run import run_federation

        run_federation(config, local_grid(config, app), view.watch(), resident=PROCESS.resident)
    else:
        from scripts.runtimes.flower import run_with_flower

        run_with_flower(config, view, is_simulation=runtime == "simulation")


def _keep_partition(config: RunConfig) -> None:
    """Save how the rows are dealt before the run begins: a run that crashed goes on only with the same rows.

    Raises:
        ConfigError: a run is to go on, and its clients no longer have the same rows; or a new run is to begin
            in the folder of an earlier one.
    """
    partition, folder = PROCESS.read_source(config).partition, run_folder(config)
    saved = folder / PARTITION
    if config.run.resume and saved.exists():
        if load_partition(saved) != partition:
            raise ConfigError(f"cannot resume: the rows are no longer those of {saved}; restore the data")
    elif not config.run.resume or _is_dealt_alike(folder, config):
        save_partition(open_run_folder(config) / PARTITION, partition)


def _is_dealt_alike(folder: Path, config: RunConfig) -> bool:
    """Return whether the run in `folder` deals its rows as `config` says; if not, it will refuse to go on."""
    try:
        begun = RunConfig.from_flat(read_keys(folder))
    except ConfigError:
        return False
    ways = [(each.data, each.seed, each.federation.num_clients) for each in (begun, config)]
    return ways[0] == ways[1]


def compare_answers(config: RunConfig, adapter: Path) -> Answers:
    """Return the greedy answers of base and adapter to the run's public prompts."""
    prompts, length = list(resolve(config).prompts), config.evaluation.max_new_tokens
    if not prompts or not length:
        return Answers([], [], [])
    state = load_adapter(adapter).state
    engine = PROCESS.resident.engine(config.model, state.layout, config.train.token_budget)
    base, number = initial_adapter(state.layout, config.seed), len(prompts)
    answers = engine.generate([base] * number + [state] * number, prompts * 2, length)
    return Answers(prompts, answers[:number], answers[number:])


class _logs_to:
    """Show what the clients of this process log (skipped rows, truncation) as notices of the run."""

    def __init__(self, view: RunView):
        self.handler = logging.Handler()
        self.handler.emit = lambda record: view.notice(record.getMessage())  # type: ignore[method-assign]

    def __enter__(self) -> None:
        logging.getLogger("fedllm").addHandler(self.handler)

    def __exit__(self, *unused: Any) -> None:
        logging.getLogger("fedllm").removeHandler(self.handler)
