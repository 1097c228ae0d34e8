"""Held-out losses of clients: base against adapter, or every client under every adapter."""

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
from scripts.answers import Answers, compare_answers
from scripts.console import Console, client_table
from scripts.evaluation.kept import may_keep_losses
from scripts.finished_run import adapter_of, bare_config, own_rows


def held_out_rows(config: RunConfig, data: str, trained: Iterable[str]) -> dict[str, ClientTokens]:
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


def evaluate_clients(target: Path, *, data: str, console: Console) -> tuple[dict[str, Any], bool]:
    """Return losses of base and adapter for every client, once they are shown, and whether to keep them.

    Raises:
        NoDataError: there are no rows to measure on.
        ConfigError: an adapter without its run needs rows.
    """
    with adapter_of(target) as found:
        if found.note:
            console.line(found.note)
        published, config = load_adapter(found.folder), found.config
        if config is None:
            if not data:
                raise ConfigError(f"{target}: an adapter without its run needs rows: give some with --data")
            config = bare_config(published)
        engine = PROCESS.resident.engine(config.model, published.state.layout, config.train.token_budget)
        clients = held_out_rows(config, data, found.clients)
        if not clients:
            raise NoDataError(f"{target}: the run keeps no held-out rows; give some with --data")
        before, after = _losses(engine, clients, published)
        answers = compare_answers(config, found.folder)
    report = report_of(before, after, answers)
    if not console.quiet:
        show_losses(console, report, answers)
    return report, may_keep_losses(config)


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


def show_losses(console: Console, report: Mapping[str, Any], answers: Answers) -> None:
    """Print a line for each client, how losses are spread, and the answers."""
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
