"""What a run will be, in plain words: what was set and by whom, what follows, and what it will cost.

Each function returns its lines; `scripts.commands.check_command` prints them.
"""

import os
from collections.abc import Mapping
from typing import Any

from clients.data_holder import DataHolder
from fedllm.adapters.layout import AdapterLayout
from fedllm.config.key import Scalar
from fedllm.models.base import choose_model, open_skeleton
from fedllm.plan.capabilities import assigned
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.checkpoint import newest_round
from fedllm.runs.folder import CHECKPOINTS, run_folder
from fedllm.runs.privacy_statement import summary_line
from scripts.console import MOST_CLIENTS, in_time, shown_path
from scripts.recipe_arguments import Request
from scripts.work import EFFICIENCY, matrix_rate, memory_of, seconds_of, size_of, work_of

# What the environment can change of a run; its keys come from recipes and words alone.
_ENVIRONMENT = (
    *("FEDLLM_SITE", "FEDLLM_CACHE", "HF_HUB_OFFLINE", "HF_HOME"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
)


def what_was_set(request: Request, in_use: Mapping[str, Scalar]) -> list[str]:
    """Return every key that somebody set, with who did, and the value in use where it is another one."""
    flat = request.config.to_flat()
    pairs = [(assigned(key, flat[key]), key) for key in flat if key in request.origins]
    width = min(44, max((len(text) for text, _ in pairs), default=0))
    lines = []
    for text, key in pairs:
        instead = f" (in use: {in_use[key]!r})" if key in in_use else ""
        lines.append(f"{text.ljust(width)}  {request.origins[key]}{instead}")
    variables = [f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ]
    return [*lines, *([f"environment: {', '.join(variables)}"] if variables else [])]


def who_has_rows(holder: DataHolder) -> list[str]:
    """Return how many training rows each client has, in a line."""
    counts = {name: len(client.train) for name, client in holder.clients.items()}
    named = [f"{name} {number:,}" for name, number in list(counts.items())[:MOST_CLIENTS]]
    more = len(counts) - len(named)
    return [f"Rows: {', '.join(named)}{f' and {more:,} more data holders' if more else ''}."]


def what_it_means(
    plan: RunPlan, layout: AdapterLayout, holder: DataHolder, figures: Mapping[str, Any]
) -> list[str]:
    """Return who trains what on which rows, what travels, what is protected and where the result goes."""
    config, folder = plan.config, run_folder(plan.config)
    train, cohort, rounds = config.train, plan.cohort.size, config.federation.num_rounds
    clients = [client for client in holder.clients.values() if client.train]
    rows = sum(len(client.train) for client in clients)
    drawn = train.local_steps * train.batch_size * cohort * rounds
    lines = [
        f"{len(clients)} data holders keep {rows:,} training rows and {figures['held-out rows']:,} held-out"
        f" rows of {config.data.source}; no row leaves them.",
        f"In each of {rounds} rounds {cohort} of them train a LoRA adapter of rank {layout.rank} on"
        f" {config.model.name}, {train.local_steps} steps of {train.batch_size} rows each: {drawn:,} rows are"
        " drawn in the whole run.",
        _what_travels(plan, figures),
        f"Privacy: {summary_line(plan.privacy)}."
        if plan.privacy
        else "Privacy: none. What travels and the adapter may reveal training text (privacy.epsilon).",
    ]
    if plan.at_home is not None:
        lines.append(
            f"After the last round each of them trains the adapter on with its own rows, at most"
            f" {plan.at_home.training.steps} steps, and keeps the result to itself; it also trains alone, at"
            f" most {plan.at_home.most_alone} steps, to tell what joining brought."
            + ("" if plan.at_home.is_reported else " No loss of that leaves.")
        )
    if plan.distillation is not None:
        lines.append(f"Distillation at the server, {figures['distillation']}.")
    taken = (
        " It holds an earlier run: add --resume, or another run.name."
        if newest_round(folder / CHECKPOINTS) and not config.run.resume
        else ""
    )
    return [*lines, f"Results: {shown_path(folder)} (adapter/ with its card, result.json).{taken}"]


def what_it_costs(
    plan: RunPlan, layout: AdapterLayout, holder: DataHolder, figures: Mapping[str, Any]
) -> list[str]:
    """Return minutes and memory, and what they are reckoned from."""
    config = plan.config
    chosen = choose_model(config.model)
    model = size_of(open_skeleton(chosen.files))
    held_out = sum(len(row.tokens) for client in holder.clients.values() for row in client.held_out)
    work = work_of(plan, tokens_a_round=figures["tokens a round"], held_out_tokens=held_out)
    rate = matrix_rate(chosen.device, chosen.dtype)
    drawn = config.train.local_steps * config.train.batch_size * plan.cohort.size
    memory = memory_of(plan, layout, model, chosen, figures["tokens a round"] / max(1, drawn))
    where = f"{chosen.device}, {str(chosen.dtype).removeprefix('torch.')}"
    passes = ("training", work.training), ("evaluation", work.evaluation), ("distillation", work.distillation)
    counts = ", ".join(f"{_count(number)} for {name}" for name, number in passes if number)
    return [
        f"about {in_time(seconds_of(work, model, rate))} of computing and {memory / 1e9:.1f} GB of memory, if"
        f" all clients run on this machine ({where}); starting and sending come on top.",
        f"Reckoned from tokens that pass through {_count(model.multiplying)} parameters ({counts}), at"
        f" {EFFICIENCY:.0%} of the {rate / 1e9:,.0f} GFLOP/s that a matrix product reached here just now.",
    ]


def _what_travels(plan: RunPlan, figures: Mapping[str, Any]) -> str:
    codec = plan.config.wire.codec
    up, down = (
        next(
            f"{value / 1e6:,.3g} MB {name.removeprefix('bytes ')}"
            for name, value in figures.items()
            if way in name
        )
        for way in ("bytes up", "bytes down")
    )
    if plan.secure is not None:
        learns = "nothing" if plan.secure.is_blind else "the sum alone"
        return (
            f"What travels: adapter changes in secret sums ({plan.secure.method}), {up}, of which the server"
            f" learns {learns}; the adapter, {down}."
        )
    return f"What travels: adapter changes as {codec}, {up}; the adapter, {down}; and a few numbers."


def _count(number: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
