"""`fedllm check`: the resolved plan of a run, measured on the real rows, before any work."""

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from clients.holder import Holder, open_holder
from fedllm.config import RunConfig, cohort_size_of
from fedllm.models.base import describe_layout
from fedllm.wire.codec import payload_bytes
from scripts.commands.words import config_of
from scripts.console import Console


def check(words: Sequence[str], *, on_bad_row: str, as_json: bool) -> None:
    """Print what the run that `words` describe would do: sizes, tokens, bytes a round, and every key."""
    config = config_of(words, [f"data.on-bad-row={on_bad_row}"] if on_bad_row else [])
    holder = open_holder(config.to_flat(), {"server-paths": True})
    plan = plan_of(config, holder)
    if as_json:
        print(json.dumps({"plan": plan, "config": config.to_flat()}))
        return
    console = Console()
    table = Table("plan", "", box=None, show_header=False, pad_edge=False)
    for name, value in plan.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:,}")
    console.rich.print(table)
    console.line("\nkeys (any of them as key=value, in a recipe, or in flwr run --run-config):")
    for key, value in config.to_flat().items():
        console.line(f"  {key} = {value!r}" if isinstance(value, str) else f"  {key} = {value}")


def plan_of(config: RunConfig, holder: Holder) -> dict[str, Any]:
    """Return the figures of a run, counted from its rows and layout."""
    layout = describe_layout(config.model, config.lora)
    clients = [client for client in holder.clients.values() if client.train]
    rows = [row for client in clients for row in client.train]
    mean_tokens = sum(len(row.tokens) for row in rows) / max(1, len(rows))
    supervised = sum(row.num_supervised for row in rows) / max(1, sum(len(row.tokens) for row in rows))
    cohort, train = cohort_size_of(config), config.train
    num_packets = 2 if train.control_variates else 1  # the adapter, and what corrects its gradients
    tokens = round(mean_tokens * train.local_steps * train.batch_size * cohort)
    sizes = sorted(len(client.train) for client in clients)
    return {
        "base model": f"{config.model.name} (fingerprint {layout.fingerprint[:16]})",
        "adapter": f"rank {layout.rank} on {len(layout.matrices)} layers, {layout.size:,} values",
        "clients": f"{len(clients)} with {sizes[0]} to {sizes[-1]} training rows" if sizes else "none",
        "held-out rows": sum(len(client.held_out) for client in clients),
        "tokens of a row": f"{mean_tokens:.0f} on average, {supervised:.0%} of them learnt",
        "rows cut off": sum(row.num_cut > 0 for row in rows),
        "cohort": f"{cohort} clients, {train.local_steps} steps of {train.batch_size} rows each",
        "tokens a round": tokens,
        "tokens of the run": tokens * config.federation.num_rounds,
        "bytes up a round": payload_bytes(layout.size, config.wire.codec) * cohort * num_packets,
        "bytes down a node and round": payload_bytes(layout.size, "fp32") * num_packets,
        "privacy": "no differential privacy; updates are not masked",
    }
