"""What the server accepts from a client. A bad reply is dropped and named; it never touches the model."""

import math
from collections.abc import Mapping

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.config import RunConfig
from fedllm.rule import aggregation_rule
from fedllm.types import ClientEvaluation, ClientFailure, ClientUpdate, JoinedClient

ROUNDING = 1.02  # what a lossy payload may add to a delta


def find_fault(
    update: ClientUpdate,
    *,
    layout: AdapterLayout,
    round_num: int,
    largest_weights: Mapping[str, float],
    largest_move: float,
) -> str:
    """Return why an update is not sound, "" where it is.

    `layout` is that of the rank it was asked for; `largest_weights` bound the weight of the client, or of
    every member of a sum. A weighted mean of sound deltas moves no value further than they do.
    The codec has already checked magic, version, checksum, layout digest, part, size and round of its packet.
    """
    moved = float(update.delta.abs().max()) if update.delta.numel() else 0.0
    if update.round_num != round_num:
        return f"the update is of round {update.round_num}"
    if update.delta.shape != (layout.size,) or update.delta.dtype != torch.float32:
        return f"the delta is {update.delta.dtype} of {update.delta.numel()} values"
    if not bool(torch.isfinite(update.delta).all()):
        return "the delta holds NaN or infinite values"
    if moved > ROUNDING * largest_move:
        return f"a value moved by {moved:.3g}, at most {largest_move:.3g} can be honest"
    for member in update.members:
        fault = _number_fault(member, largest_weights[member.client_id])
        if fault:
            return f"in the sum of its node, client {member.client_id}: {fault}"
    return "" if update.members else _number_fault(update, largest_weights[update.client_id])


def _number_fault(update: ClientUpdate, largest_weight: float) -> str:
    if not math.isfinite(update.weight) or update.weight <= 0:
        return f"the weight {update.weight:g} is not a positive number"
    if update.weight > largest_weight:
        return f"the weight {update.weight:g} is above the {largest_weight:g} declared at joining"
    if not math.isfinite(update.train_loss) or update.train_loss < 0:
        return "the training loss is not a finite positive number"
    return ""


def largest_weight(joined: JoinedClient, config: RunConfig) -> float:
    """Return the most a client may declare to weigh: its rows, the tokens a round can hold, or 1.

    Under product-norm the server itself measures what a client counts.
    """
    train = config.train
    return {
        "examples": float(joined.num_train),
        "tokens": float(train.local_steps * train.batch_size * train.max_length),
        "uniform": 1.0,
        "product-norm": 1.0,
    }[aggregation_rule(config).weighting]


def check_evaluation(evaluation: ClientEvaluation) -> ClientEvaluation | ClientFailure:
    """Return the evaluation where it is sound, else why it is refused."""
    if math.isfinite(evaluation.loss) and evaluation.loss >= 0 and evaluation.num_tokens > 0:
        return evaluation
    return ClientFailure(
        client_id=evaluation.client_id, code="refused", reason="the held-out loss is not a finite number"
    )
