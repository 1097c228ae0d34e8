"""Kinds of trials that are federations: the product's own run, round by round in this process.

Every client has a node of its own, as in a deployment, so the bytes counted are those of its own messages.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from fedllm.config.run_config import RunConfig
from fedllm.runs.records import RoundRecord
from scripts.runtimes.local import LocalState, init, step
from scripts.studies.trials import Figures, Setting, Trial


def federation(trial: Trial, setting: Setting) -> Figures:
    """Do a run and return its figures."""
    return figures_of(run(setting.config(trial)).records)


def run(config: RunConfig, num_nodes: int = 0) -> LocalState:
    """Return a federation after all its rounds, on so many nodes; 0 = one for every client.

    Raises:
        FedLLMError: it cannot start or go on.
    """
    state = init(config, num_nodes=num_nodes or config.federation.num_clients)
    for _ in range(config.federation.num_rounds):
        state, _ = step(state)
    return state


def figures_of(records: Sequence[RoundRecord]) -> Figures:
    """Return what the records of a run say: losses before and after, errors of every round, bytes, tokens.

    Bytes are those of the packets, per client that was asked in a round. What a measured round sends for its
    evaluation is in its record too, so bytes down are those of the other rounds where there are any.
    """
    rounds = [record for record in records if record.round_num > 0]
    unmeasured = [record for record in rounds if not record.held_out] or rounds
    return {
        **losses(records[0].held_out, records[-1].held_out),
        "rho": [record.aggregation.rho for record in rounds],
        "kept": [record.aggregation.kept_energy for record in rounds],
        "delta_norm": [record.aggregation.delta_norm for record in rounds],
        "bytes_up": _per_client([record.bytes_up for record in rounds], rounds),
        "bytes_down": _per_client([record.bytes_down for record in unmeasured], unmeasured),
        "tokens": sum(record.training.num_tokens for record in rounds),
        "lost": sum(len(record.lost) for record in rounds),
        "lost_reasons": sorted({reason for record in rounds for reason in record.lost.values()}),
    }


def _per_client(num_bytes: Sequence[int], rounds: Sequence[RoundRecord]) -> float:
    return sum(num_bytes) / max(1, sum(len(record.asked) for record in rounds))


def losses(before: Mapping[str, float], after: Mapping[str, float]) -> Figures:
    """Return the clients' held-out losses (nats per token) with their mean, their worst and their spread."""
    values = list(after.values())
    return {
        "before": dict(before),
        "after": dict(after),
        "mean_before": statistics.fmean(before.values()),
        "mean_after": statistics.fmean(values),
        "worst_after": max(values),
        "spread_after": statistics.pstdev(values),
    }


def mean_of(figures: Figures, name: str) -> float:
    """Return the mean over rounds of a figure that every round has; NaN where none has it."""
    values = [value for value in figures.get(name, ()) if value is not None]
    return statistics.fmean(values) if values else math.nan
