"""`fedllm check`: the resolved plan of a run, measured on the real rows, before any work."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from clients.data_holder import DataHolder
from clients.lost_rows import RowCounts, check_none_left_out, describe
from clients.process import Process
from fedllm.adapters.layout import AdapterLayout, at_rank
from fedllm.adapters.parts import part_size
from fedllm.config.key import Scalar
from fedllm.config.keys import DistillConfig
from fedllm.data.partition import Partition
from fedllm.models.base import choose_model, describe_layout, how_held
from fedllm.plan.aggregation import AXES
from fedllm.plan.capabilities import assigned
from fedllm.plan.run_plan import RunPlan, resolve
from fedllm.runs.privacy_statement import summary_line
from fedllm.wire.masks import delta_bytes
from fedllm.wire.packets import payload_bytes
from scripts.console import Console
from scripts.finished_run import own_rows
from scripts.plan_page import what_it_costs, what_it_means, what_was_set, who_has_rows
from scripts.recipe_arguments import request_of
from strategies.distillation.gate import LEAST_AHEAD
from strategies.trackers import tracker_names

_MOST_NAMES = 20


def check(words: Sequence[str], *, on_bad_row: str, as_json: bool, show_all: bool = False) -> None:
    """Print what the run that `words` describe would do, and what it costs; with `show_all` every key too."""
    request = request_of(words, [f"data.on-bad-row={on_bad_row}"] if on_bad_row else [])
    config = request.config
    choose_model(config.model)  # refuses a device or a quantisation that the run would refuse
    tracker_names(config.track.to)
    own, process = own_rows(config), Process()
    holder = process.open(own.to_flat(), {"server-paths": True})
    check_none_left_out(holder.counts, config.train.max_length)
    plan = resolve(config)
    figures = figures_of(plan, holder) | renamed_clients(process.read_source(own).partition)
    if as_json:
        print(json.dumps({"plan": figures, "config": config.to_flat(), "set_by": dict(request.origins)}))
        return
    console, layout = Console(), describe_layout(config.model, config.lora)
    meaning = [*who_has_rows(holder), *what_it_means(plan, layout, holder, figures)]
    _print_part(console, "set", what_was_set(request, replaced_values(plan)))
    _print_part(console, "what it means", meaning)
    _print_part(console, "what it costs", what_it_costs(plan, layout, holder, figures))
    _print_figures(console, figures)
    if show_all:
        _print_keys(console, plan)
    again = shlex.join(words)
    console.line(f"\nnext:     fedllm run {again}".rstrip())
    if not show_all:
        console.line(f"all keys: fedllm check --all {again}".rstrip())


def _print_part(console: Console, title: str, lines: Sequence[str]) -> None:
    console.line(title, style="bold")
    for line in lines:
        console.paragraph(line)


def _print_figures(console: Console, figures: Mapping[str, Any]) -> None:
    console.line("figures", style="bold")
    table = Table("", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in figures.items():
        table.add_row(f"  {name}", value if isinstance(value, str) else f"{value:,}")
    console.rich.print(table)


def _print_keys(console: Console, plan: RunPlan) -> None:
    console.line("\nkeys (any of them as key=value, in a recipe, or in flwr run --run-config):")
    replaced = replaced_values(plan)
    for key, value in plan.config.to_flat().items():
        instead = f" (in use: {replaced[key]!r})" if key in replaced else ""
        console.line(f"  {assigned(key, value)}{instead}")


def figures_of(plan: RunPlan, holder: DataHolder) -> dict[str, Any]:
    """Return the figures of a run, counted from its rows and layout."""
    config, privacy = plan.config, plan.privacy
    left_out: list[str] = []
    layout = describe_layout(config.model, config.lora, left_out.append)
    clients = [client for client in holder.clients.values() if client.train]
    rows = [row for client in clients for row in client.train]
    mean_tokens = sum(len(row.tokens) for row in rows) / max(1, len(rows))
    supervised = sum(row.num_supervised for row in rows) / max(1, sum(len(row.tokens) for row in rows))
    cohort, train = plan.cohort.size, config.train
    warning = holder.resident.check_tokenizer(config.model, train.max_length)
    tokens = round(mean_tokens * train.local_steps * train.batch_size * cohort)
    sizes = sorted(len(client.train) for client in clients)
    return {
        "base model": f"{config.model.name} (fingerprint {layout.fingerprint[:16]})",
        "adapter": f"rank {layout.rank} on {len(layout.matrices)} layers, {layout.size:,} values",
        "computed": " on ".join(how_held(config.model).values()),
        **({"layers left out": left_out[0]} if left_out else {}),
        "clients": f"{len(clients)} with {sizes[0]} to {sizes[-1]} training rows" if sizes else "none",
        "held-out rows": sum(len(client.held_out) for client in clients),
        "tokens of a row": f"{mean_tokens:.0f} on average, {supervised:.0%} of them learnt",
        "rows cut off": sum(row.num_cut > 0 for row in rows),
        "rows lost": describe(sum(holder.counts.values(), RowCounts()), train.max_length) or "none",
        "longest row": warning or f"{train.max_length} tokens",
        "cohort": f"{cohort} clients, {train.local_steps} steps of {train.batch_size} rows each",
        "tokens a round": tokens,
        "tokens of the run": tokens * config.federation.num_rounds,
        **_bytes(plan, layout, [client.client_id for client in clients]),
        "aggregation": _aggregation(plan),
        "distillation": _distillation(config.distill),
        "privacy": summary_line(privacy) if privacy else "no differential privacy",
        "secret sums": f"{plan.secure.method}, among at least {plan.secure.min_parties} parties"
        if plan.secure
        else "none; the server sees every update",
    }


def renamed_clients(partition: Partition) -> dict[str, str]:
    """Return the clients whose value of the column cannot be their name, with the beginning of that value."""
    values = [f"{name} = {value[:40]!r}" for name, value in sorted(partition.values.items())]
    more = f" and {len(values) - _MOST_NAMES} more" if len(values) > _MOST_NAMES else ""
    return {"clients renamed": ", ".join(values[:_MOST_NAMES]) + more} if values else {}


def replaced_values(plan: RunPlan) -> dict[str, Scalar]:
    """Return the value in use of every key where a preset, privacy or "auto" replaces the one given."""
    given = plan.config.to_flat()
    return {key: used for key, used in plan.in_use().items() if used != given[key]}


def _aggregation(plan: RunPlan) -> str:
    """Return the rule as it is in use, in a line, and where it comes from if not from its keys."""
    rule, preset = plan.aggregation, plan.config.aggregation.preset
    line = f"train {rule.train}, read-out {rule.read_out}, weighting {rule.weighting}"
    if not replaced_values(plan).keys() & set(AXES):
        return line
    return f"{line}; by {f'aggregation.preset = {preset!r}' if preset else 'privacy, as no preset is named'}"


def _distillation(numbers: DistillConfig) -> str:
    """Return what the server will distil, in a line."""
    if numbers.when == "never":
        return "none"
    when = "after the last round" if numbers.when == "last" else "after every round"
    return (
        f"{when}: at most {numbers.max_teachers} clients teach on {numbers.num_texts} texts of up to"
        f" {numbers.max_tokens} tokens ({numbers.text}); {numbers.steps} steps of {numbers.batch_size};"
        f" skipped where their ensemble is ahead of the aggregate by {LEAST_AHEAD:g} nats a token or less"
    )


def _bytes(plan: RunPlan, layout: AdapterLayout, clients: Sequence[str]) -> dict[str, int]:
    """Return payload bytes; those of deltas on average over two rounds, which may train different factors."""
    config, rule = plan.config, plan.aggregation
    controls = layout.size if config.train.control_variates else 0  # a second packet both ways
    down = payload_bytes(part_size(layout, rule.changing_part), "fp32") + payload_bytes(controls, "fp32")
    parts = [rule.returned_in(number) for number in (1, 2)]

    def packet(rank: int) -> float:
        sizes = (part_size(at_rank(layout, rank), part) for part in parts)
        mean = sum(delta_bytes(plan, size) for size in sizes) / len(parts)
        return mean + payload_bytes(controls, config.wire.codec)

    if config.wire.node_sum:
        return {"bytes up a node and round": round(packet(layout.rank)), "bytes down a node and round": down}
    ranks = plan.ranks(clients).values() or [layout.rank]
    mean_up = sum(map(packet, ranks)) / len(ranks)
    return {
        "bytes up a round": round(mean_up * plan.cohort.size),
        "bytes down a node and round": down,
    }
