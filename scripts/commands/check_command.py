"""`fedllm check`: the resolved plan of a run, measured on the real rows, before any work."""

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from clients.data_holder import DataHolder
from clients.process import Process
from fedllm.adapters.layout import AdapterLayout, at_rank
from fedllm.adapters.parts import part_size
from fedllm.config.run_config import RunConfig
from fedllm.models.base import describe_layout
from fedllm.plan.dealt_numbers import deal_ranks
from fedllm.plan.run_plan import resolve
from fedllm.runs.privacy_statement import summary_line
from fedllm.wire.packets import payload_bytes
from scripts.console import Console
from scripts.finished_run import own_rows
from scripts.recipe_arguments import config_of


def check(words: Sequence[str], *, on_bad_row: str, as_json: bool) -> None:
    """Print what the run that `words` describe would do: sizes, tokens, bytes a round, and every key."""
    config = config_of(words, [f"data.on-bad-row={on_bad_row}"] if on_bad_row else [])
    holder = Process().open(own_rows(config).to_flat(), {"server-paths": True})
    plan = figures_of(config, holder)
    if as_json:
        print(json.dumps({"plan": plan, "config": config.to_flat()}))
        return
    console = Console()
    table = Table("plan", "", box=None, show_header=False, pad_edge=False)
    for name, value in plan.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:,}")
    console.rich.print(table)
    console.line("\nkeys (any of them as key=value, in a recipe, or in flwr run --run-config):")
    resolved = resolved_axes(config)
    for key, value in config.to_flat().items():
        instead = f" (in use: {resolved[key]!r})" if key in resolved else ""
        console.line(f"  {key} = {value!r}{instead}" if isinstance(value, str) else f"  {key} = {value}")


def figures_of(config: RunConfig, holder: DataHolder) -> dict[str, Any]:
    """Return the figures of a run, counted from its rows and layout."""
    layout = describe_layout(config.model, config.lora)
    clients = [client for client in holder.clients.values() if client.train]
    rows = [row for client in clients for row in client.train]
    mean_tokens = sum(len(row.tokens) for row in rows) / max(1, len(rows))
    supervised = sum(row.num_supervised for row in rows) / max(1, sum(len(row.tokens) for row in rows))
    cohort, train = resolve(config).cohort.size, config.train
    tokens = round(mean_tokens * train.local_steps * train.batch_size * cohort)
    privacy = resolve(config).privacy
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
        **_bytes(config, layout, [client.client_id for client in clients]),
        "aggregation": _aggregation(config),
        "distillation": _distillation(config),
        "privacy": summary_line(privacy) if privacy else "no differential privacy; updates are not masked",
    }


def resolved_axes(config: RunConfig) -> dict[str, str]:
    """Return the keys of the rule whose value a preset, or privacy, replaces, each with the value in use."""
    rule, given = resolve(config).aggregation, config.aggregation
    in_use = {
        "aggregation.train": (rule.train, given.train),
        "aggregation.read-out": (rule.read_out, given.read_out),
        "aggregation.weighting": (rule.weighting, given.weighting),
    }
    return {key: used for key, (used, named) in in_use.items() if used != named}


def _aggregation(config: RunConfig) -> str:
    """Return the rule as it is in use, in a line, and where it comes from if not from its keys."""
    rule = resolve(config).aggregation
    line = f"train {rule.train}, read-out {rule.read_out}, weighting {rule.weighting}"
    if not resolved_axes(config):
        return line
    preset = config.aggregation.preset
    return f"{line}; by {f'aggregation.preset = {preset!r}' if preset else 'privacy, as no preset is named'}"


def _distillation(config: RunConfig) -> str:
    """Return what the server will distil, in a line."""
    numbers = config.distill
    if numbers.when == "never":
        return "none"
    when = "after the last round" if numbers.when == "last" else "after every round"
    return (
        f"{when}: at most {numbers.max_teachers} clients teach on {numbers.num_texts} texts of up to"
        f" {numbers.max_tokens} tokens ({numbers.text}); {numbers.steps} steps of {numbers.batch_size}"
    )


def _bytes(config: RunConfig, layout: AdapterLayout, clients: Sequence[str]) -> dict[str, int]:
    """Return payload bytes; those of deltas on average over two rounds, which may train different factors."""
    rule = resolve(config).aggregation
    controls = layout.size if config.train.control_variates else 0  # a second packet both ways
    down = payload_bytes(part_size(layout, rule.changing_part), "fp32") + payload_bytes(controls, "fp32")
    parts = [rule.returned_in(number) for number in (1, 2)]

    def packet(rank: int) -> float:
        sizes = (part_size(at_rank(layout, rank), part) for part in parts)
        mean = sum(payload_bytes(size, config.wire.codec) for size in sizes) / len(parts)
        return mean + payload_bytes(controls, config.wire.codec)

    if config.wire.node_sum:
        return {"bytes up a node and round": round(packet(layout.rank)), "bytes down a node and round": down}
    ranks = deal_ranks(config.lora.client_ranks, clients, layout.rank).values() or [layout.rank]
    mean_up = sum(map(packet, ranks)) / len(ranks)
    return {
        "bytes up a round": round(mean_up * resolve(config).cohort.size),
        "bytes down a node and round": down,
    }
