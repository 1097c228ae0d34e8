"""How a loss is spread over clients: a mean alone hides whom a federation fails."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord


@dataclass(frozen=True)
class Spread:
    """Loss over clients, in nats per token: mean, the worst client, largest - smallest, standard deviation.

    The deviation is that of these clients, not an estimate for others: it divides by their number.
    """

    mean: float
    worst: float
    worst_client: str
    spread: float
    deviation: float


def spread_of(losses: Mapping[str, float]) -> Spread:
    """Return how the losses of at least one client are spread; of equal worst clients the first by name."""
    values = losses.values()
    mean = sum(values) / len(values)
    worst_client = min(losses, key=lambda client: (-losses[client], client))
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return Spread(mean, losses[worst_client], worst_client, max(values) - min(values), deviation)


def keep_common_clients(columns: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return columns of losses with only the clients that all of them have, by name.

    Empty columns are left out: they measured nothing, so they say nothing about who can be compared.
    """
    shown = {name: losses for name, losses in columns.items() if losses}
    clients = sorted(set.intersection(*(set(losses) for losses in shown.values()))) if shown else []
    return {name: {client: losses[client] for client in clients} for name, losses in shown.items()}


def spread_and_losses(losses: Mapping[str, float]) -> dict[str, Any]:
    """Return losses as `result.json` has them: the spread's numbers, and every client's loss."""
    return {**asdict(spread_of(losses)), "clients": dict(losses)}


def measured_ends(state: ServerState) -> dict[str, RoundRecord]:
    """Return the records "before" round 1 and "after" the last round, with the losses of the same clients.

    Where either was not measured, where no client is in both, or where the last losses are not those of the
    adapter that is published, there is nothing to compare and so nothing is returned.
    """
    if not state.records or state.records[0].round_num != 0:
        return {}
    first, last = state.records[0], state.records[-1]
    if last.adapter != state.adapter.digest:  # its losses are of another adapter
        return {}
    losses = keep_common_clients({"before": first.held_out, "after": last.held_out})
    if len(losses) < 2 or not losses["after"]:
        return {}
    return {"before": _of_clients(first, losses["after"]), "after": _of_clients(last, losses["after"])}


def _of_clients(record: RoundRecord, clients: Collection[str]) -> RoundRecord:
    """Return a record with the held-out losses of these clients alone."""
    shared, personal = (
        {client: losses[client] for client in clients if client in losses}
        for losses in (record.held_out, record.personal_held_out)
    )
    return replace(record, held_out=shared, personal_held_out=personal)
