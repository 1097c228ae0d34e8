"""How a loss is spread over clients: a mean alone hides whom a federation fails."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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
