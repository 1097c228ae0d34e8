"""`fedllm evaluate`: base against adapter on every client's held-out rows, or on a file of your own."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clients.process import PROCESS
from clients.tokens import ClientTokens, encode_client
from fedllm.adapters.folder import PublishedAdapter, load_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.config.run_config import RunConfig
from fedllm.data.shards import load_one_client
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import ConfigError, NoDataError
from fedllm.messages import ClientEvaluation
from fedllm.models.files import resolve_model
from fedllm.runs.spread import spread_of
from scripts.commands.run_command import Answers, compare_answers
from scripts.console import Console, client_table
from scripts.finished_run import Found, adapter_of, bare_config, own_rows


def evaluate(target: Path, *, data: str, as_json: bool) -> None:
    """Print losses and perplexities of base and adapter for every client, the worst client, and answers."""
    with adapter_of(target) as found:
        if found.note:
            Console(quiet=as_json).line(found.note)
        _evaluate(target, found, data=data, as_json=as_json)


def _evaluate(target: Path, found: Found, *, data: str, as_json: bool) -> None:
    published, config = load_adapter(found.folder), found.config
    if config is None:
        if not data:
            raise ConfigError(f"{target}: an adapter without its run needs rows: give some with --data")
        config = bare_config(published)
    engine = PROCESS.resident.engine(config.model, published.state.layout, config.train.token_budget)
    clients = _clients(config, data, found.clients)
    if not clients:
        raise NoDataError(f"{target}: the run keeps no held-out rows; give some with --data")
    before, after = _losses(engine, clients, published)
    answers = compare_answers(config, found.folder)
    report = report_of(before, after, answers)
    if as_json:
        print(json.dumps(report))
    else:
        _print(Console(), report, answers)


def _clients(config: RunConfig, data: str, trained: Iterable[str]) -> dict[str, ClientTokens]:
    """Return each client with the rows to evaluate on as its held-out rows."""
    if not data:
        holder = PROCESS.open(own_rows(config).to_flat(), {"server-paths": True})
        if not set(trained) <= holder.clients.keys():
            raise NoDataError("the run's clients keep their rows elsewhere; give some with --data")
        return {name: client for name, client in holder.clients.items() if client.held_out}
    whole = config.override({"data.held-out-fraction": 0.0, "data.max-rows": "all"}).data
    rows = load_one_client(data, whole, client_id=Path(data).stem, seed=config.seed).client
    files = resolve_model(config.model.name)
    client = encode_client(rows, PROCESS.resident.tokenizer(files), config.train.max_length)
    return {client.client_id: ClientTokens(client.client_id, (), client.train)}


def _losses(
    engine: Engine, clients: Mapping[str, ClientTokens], published: PublishedAdapter
) -> tuple[dict[str, ClientEvaluation], dict[str, ClientEvaluation]]:
    """Return every client's losses under the base model and under the adapter."""
    states = (initial_adapter(published.state.layout, 0), published.state)
    jobs = [
        EvaluationJob(name, state.vector, client.held_out)
        for state in states
        for name, client in clients.items()
    ]
    done = engine.evaluate(jobs)
    halves = done[: len(clients)], done[len(clients) :]
    before, after = ({answer.client_id: answer for answer in half} for half in halves)
    return before, after


def report_of(
    before: Mapping[str, ClientEvaluation], after: Mapping[str, ClientEvaluation], answers: Answers
) -> dict[str, Any]:
    """Return the JSON form of an evaluation: per client, mean over clients, the worst client, the spread."""
    base = spread_of({name: before[name].loss for name in after})
    adapter = spread_of({name: after[name].loss for name in after})
    worst = adapter.worst_client
    return {
        "clients": {
            name: {
                "rows": after[name].num_rows,
                "tokens": after[name].num_tokens,
                "base": {"loss": before[name].loss, "perplexity": before[name].perplexity},
                "adapter": {"loss": after[name].loss, "perplexity": after[name].perplexity},
            }
            for name in after
        },
        "mean": {"base": base.mean, "adapter": adapter.mean},
        "worst": {"client": worst, "base": before[worst].loss, "adapter": after[worst].loss},
        "spread": {"base": base.spread, "adapter": adapter.spread},
        "deviation": {"base": base.deviation, "adapter": adapter.deviation},
        "answers": vars(answers),
    }


def _print(console: Console, report: Mapping[str, Any], answers: Answers) -> None:
    console.line("loss (nats per token) and perplexity (ppl) on held-out rows")
    table = client_table("rows", "tokens", "base", "adapter", "base ppl", "adapter ppl")
    for name, row in report["clients"].items():
        base, adapter = row["base"], row["adapter"]
        numbers = (f"{base['loss']:.4f}", f"{adapter['loss']:.4f}")
        perplexities = (f"{base['perplexity']:.2f}", f"{adapter['perplexity']:.2f}")
        table.add_row(name, str(row["rows"]), str(row["tokens"]), *numbers, *perplexities)
    mean, worst = report["mean"], report["worst"]
    table.add_row("mean", "", "", f"{mean['base']:.4f}", f"{mean['adapter']:.4f}", style="bold")
    table.add_row(f"worst: {worst['client']}", "", "", f"{worst['base']:.4f}", f"{worst['adapter']:.4f}")
    for label, key in (("worst - best", "spread"), ("deviation", "deviation")):
        table.add_row(label, "", "", f"{report[key]['base']:.4f}", f"{report[key]['adapter']:.4f}")
    console.rich.print(table)
    console.answers(answers.prompts, answers.before, answers.after)
