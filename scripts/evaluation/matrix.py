"""Clients x adapters: the loss of every client's held-out rows under every adapter.

The columns are the adapters that are named and, of a run whose clients keep one for themselves on this
machine, each client's own. So it shows whom an adapter serves besides the client that made it.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from clients.home_folder import home_folder
from clients.personal import PERSONAL
from clients.process import PROCESS
from clients.state import load_newest
from clients.tokens import ClientTokens
from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import AdapterState, at_rank
from fedllm.adapters.side_by_side import side_by_side
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.plan.run_plan import resolve
from scripts.console import Console, client_table, number_text
from scripts.evaluation.columns import Column, by_engine, open_engine
from scripts.finished_run import own_rows
from scripts.runtimes.local import node_config_of

MOST_COLUMNS = 12  # that a table shows one by one
Losses = dict[str, dict[str, float]]  # client -> adapter -> nats per token


def own_name(client: str) -> str:
    """Return the name of a client's own adapter among the columns."""
    return f"own:{client}"


def own_adapters(run: Column) -> dict[str, AdapterState]:
    """Return what each client of a run would use on this machine, where it keeps an adapter of its own.

    That is the one it trained on at home, or its personal one together with the shared adapter.

    Raises:
        IntegrityError: what a client keeps is damaged.
    """
    config = own_rows(run.config)
    plan = resolve(config)
    if run.layout is None or run.vector is None or (plan.personal is None and plan.at_home is None):
        return {}
    holder = PROCESS.open(config.to_flat(), node_config_of(config))
    if plan.personal is None:
        folders = {name: home_folder(holder.store, name) for name in holder.clients}
        made = {name: folder for name, folder in folders.items() if folder.is_dir()}
        return {name: load_adapter(folder, made_here=True).state for name, folder in made.items()}
    rank = plan.personal.rank
    kept = {name: load_newest(holder.store, name) for name in holder.clients}
    wide = at_rank(run.layout, run.layout.rank + rank)
    return {
        name: AdapterState(wide, side_by_side(run.layout, run.vector, vectors[PERSONAL], rank))
        for name, vectors in kept.items()
        if PERSONAL in vectors
    }


def evaluate_matrix(
    columns: Sequence[Column], clients: Mapping[str, ClientTokens], own: Mapping[str, AdapterState]
) -> Losses:
    """Return the losses of all clients under all columns, and under each client's own adapter."""
    found: Losses = {name: {} for name in clients}
    for engine, adapters in by_engine(columns):
        states = {name: AdapterState(engine.layout, vector) for name, vector in adapters.items()}
        _measure(engine, states, clients, found)
    names = [column.name for column in columns]
    if own:
        run = next(column for column in columns if column.clients is not None)
        states = {own_name(client): state for client, state in own.items()}
        _measure(open_engine(run), states, clients, found)
        names += states
    return {client: {name: losses[name] for name in names} for client, losses in found.items()}


def _measure(
    engine: Engine,
    states: Mapping[str, AdapterState],
    clients: Mapping[str, ClientTokens],
    found: Losses,
) -> None:
    """Add the losses of all clients under some adapters, which share passes."""
    pairs = [(name, client) for name in states for client in clients]
    jobs = [
        EvaluationJob(client, states[name].vector, clients[client].held_out, states[name].layout)
        for name, client in pairs
    ]
    for (name, client), answer in zip(pairs, engine.evaluate(jobs), strict=True):
        found[client][name] = answer.loss


def matrix_report(losses: Losses) -> dict[str, Any]:
    """Return the JSON form: the losses, and of own adapters the mean on own rows and on those of others."""
    own = {client: row[own_name(client)] for client, row in losses.items() if own_name(client) in row}
    own_names = set(map(own_name, own))
    others = [
        loss
        for client, row in losses.items()
        for name, loss in row.items()
        if name in own_names and name != own_name(client)
    ]
    report: dict[str, Any] = {"losses": losses}
    if own:
        report["own"] = {"on_own": statistics.fmean(own.values())}
        report["own"]["on_others"] = statistics.fmean(others) if others else None
    return report


def show_matrix(console: Console, report: Mapping[str, Any]) -> None:
    """Print a row for each client; where there are many own adapters, each client's own alone."""
    losses: Losses = report["losses"]
    names = list(next(iter(losses.values())))
    if "own" in report and len(names) > MOST_COLUMNS:
        names = [name for name in names if not name.startswith(own_name(""))] + ["own"]
    console.line("loss (nats per token) of held-out rows: a row for each client, a column for each adapter")
    table = client_table(*names)
    for client, row in losses.items():
        table.add_row(client, *(number_text(row.get(_named(name, client))) for name in names))
    console.rich.print(table)
    if own := report.get("own"):
        others = "" if own["on_others"] is None else f"; on other clients' rows {own['on_others']:.3f}"
        console.line(f"clients' own adapters: {own['on_own']:.3f} on their own rows{others}")


def _named(name: str, client: str) -> str:
    return own_name(client) if name == "own" else name
