"""`fedllm adapt`: clients train a shared adapter on with their own rows, whenever and wherever they like."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from clients.at_home import Starts, can_choose, train_both
from clients.home_folder import modules_of, save_home
from clients.process import PROCESS
from clients.tokens import ClientTokens, encode_client
from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.data.shards import load_one_client
from fedllm.errors import ConfigError, NoDataError
from fedllm.models.files import resolve_model
from fedllm.plan.run_plan import RunPlan, resolve
from fedllm.plan.training import HomeTraining
from fedllm.runs.records import HomeRecord
from scripts.console import Console, shown_path
from scripts.finished_run import adapter_of, bare_config, check_new, own_rows


def adapt(
    target: Path, *, data: str, out: Path | None, steps: int, learning_rate: float | None, as_json: bool
) -> None:
    """Write each client's adapter as a private PEFT folder, and print what it gains over training alone.

    Raises:
        ConfigError: there is no adapter, the folder holds something already, or the rate is not above 0.
        NoDataError: nobody has rows to train on and two to choose and measure by.
        FedLLMError: the rows, the adapter or the base model cannot be used.
    """
    console = Console(quiet=as_json)
    with adapter_of(target) as found:
        if found.note:
            console.line(found.note)
        published, config = load_adapter(found.folder), found.config
    if config is None and not data:
        raise ConfigError(f"{target}: an adapter without its run needs rows: give some with --data")
    run = target if (target / "config.toml").is_file() else target.parent  # where it is a run's `adapter`
    folder = out or (Path("adapted") if config is None else run / "private" / "adapted")
    check_new(folder, "--out")
    rate: dict[str, Scalar] = {}  # that of the run, of its steps at home where they have one
    if learning_rate is not None:
        rate = {"train.learning-rate": learning_rate, "personal.mode": "none"}
    plan = resolve((config or bare_config(published)).override(rate))
    clients, layout = _clients(plan.config, data), published.state.layout
    numbers = _numbers(plan, is_known=config is not None, steps=steps)
    engine = PROCESS.resident.engine(plan.config.model, layout, plan.config.train.token_budget)
    found_home = train_both(
        engine,
        layout,
        clients,
        Starts(initial_adapter(layout, plan.config.seed, plan.init_a).vector, published.state.vector),
        numbers,
        drawn=dict.fromkeys(clients, numbers.rounds_steps * numbers.training.batch_size),
        seed=plan.config.seed,
        on_shared=nullcontext(),  # what the run added to the base model is part of the published adapter
    )
    files, modules = resolve_model(plan.config.model.name), modules_of(engine.base.model, layout)
    folders = {}
    for answer, vector_P in found_home:
        folders[answer.client_id] = folder if data else folder / answer.client_id
        save_home(folders[answer.client_id], AdapterState(layout, vector_P), answer, files, modules)
    result = HomeRecord.of(answer for answer, _ in found_home).to_result()
    if as_json:
        print(json.dumps({**result, "folders": {name: str(path) for name, path in folders.items()}}))
        return
    console.at_home(result)
    console.line(f"\nadapters, not to be published: {shown_path(folder)}")


def _clients(config: RunConfig, data: str) -> dict[str, ClientTokens]:
    """Return the clients with rows enough: those of a run, or one with the rows `data`."""
    if data:
        rows = load_one_client(data, config.data, client_id=Path(data).stem, seed=config.seed).client
        tokenizer = PROCESS.resident.tokenizer(resolve_model(config.model.name))
        clients = {rows.client_id: encode_client(rows, tokenizer, config.train.max_length)}
    else:
        clients = {**PROCESS.open(own_rows(config).to_flat(), {"server-paths": True}).clients}
    able = {name: client for name, client in clients.items() if can_choose(client)}
    if not able:
        raise NoDataError(
            "nobody has a row to train on and two different ones held out, one to choose the number of steps"
            " and one to measure; give more rows with --data"
        )
    return able


def _numbers(plan: RunPlan, *, is_known: bool, steps: int) -> HomeTraining:
    """Return how clients train.

    The control takes the steps of home and, where the run is known, those that its rounds asked of a client
    on average.
    """
    federation, share = plan.config.federation, plan.cohort.size / plan.config.federation.num_clients
    rounds = round(federation.num_rounds * plan.config.train.local_steps * share) if is_known else 0
    training = plan.training(1) if plan.at_home is None else plan.at_home.training
    training = replace(training, steps=steps, proximal=0.0)
    return HomeTraining(training=training, rounds_steps=rounds, is_reported=True)
