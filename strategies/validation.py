"""What the server accepts from a client. A bad reply is dropped and named; it never touches the model."""

import math

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.config import RunConfig
from fedllm.types import ClientEvaluation, ClientFailure, ClientUpdate, JoinedClient

ROUNDING = 1.02  # what a lossy payload may add to a delta


def check_update(
    update: ClientUpdate,
    *,
    joined: JoinedClient,
    layout: AdapterLayout,
    round_num: int,
    largest_weight: float,
    largest_move: float,
    largest_control: float = 0.0,
) -> ClientUpdate | ClientFailure:
    """Return `update` where it is sound, else why it is refused.

    The codec has already checked magic, version, checksum, layout digest, size and round of its packets.
    `largest_control` is the most by which a control variate can honestly change, in Euclidean norm.
    """
    reason = None
    moved = float(update.delta.abs().max()) if update.delta.numel() else 0.0
    if update.round_num != round_num:
        reason = f"the update is of round {update.round_num}"
    elif update.delta.shape != (layout.size,) or update.delta.dtype != torch.float32:
        reason = f"the delta is {update.delta.dtype} of {update.delta.numel()} values"
    elif not bool(torch.isfinite(update.delta).all()):
        reason = "the delta holds NaN or infinite values"
    elif moved > ROUNDING * largest_move:
        reason = f"a value moved by {moved:.3g}, at most {largest_move:.3g} can be honest"
    elif not math.isfinite(update.weight) or update.weight <= 0:
        reason = f"the weight {update.weight:g} is not a positive number"
    elif update.weight > largest_weight:
        reason = f"the weight {update.weight:g} is above the {largest_weight:g} declared at joining"
    elif not math.isfinite(update.train_loss) or update.train_loss < 0:
        reason = "the training loss is not a finite positive number"
    elif update.control_delta is not None:
        reason = _control_problem(update.control_delta, layout, largest_control)
    return ClientFailure(client_id=joined.client_id, code="refused", reason=reason) if reason else update


def _control_problem(change_P: torch.Tensor, layout: AdapterLayout, largest: float) -> str | None:
    """Return why the change of a control variate is refused, or None."""
    norm = float(change_P.norm())
    if change_P.shape != (layout.size,) or not math.isfinite(norm):
        return "the change of its control variate is not finite"
    if norm > ROUNDING * largest:
        return f"its control variate changed by {norm:.3g}, at most {largest:.3g} can be honest"
    return None


def largest_weight(joined: JoinedClient, config: RunConfig) -> float:
    """Return the most a client may weigh: its declared rows, the tokens a round can hold, or 1."""
    train = config.train
    return {
        "examples": float(joined.num_train),
        "tokens": float(train.local_steps * train.batch_size * train.max_length),
        "uniform": 1.0,
    }[config.aggregation.weighting]


def check_evaluation(evaluation: ClientEvaluation) -> ClientEvaluation | ClientFailure:
    """Return the evaluation where it is sound, else why it is refused."""
    losses = [loss for loss in (evaluation.loss, evaluation.personal_loss) if loss is not None]
    if all(math.isfinite(loss) and loss >= 0 for loss in losses) and evaluation.num_tokens > 0:
        return evaluation
    return ClientFailure(
        client_id=evaluation.client_id, code="refused", reason="the held-out loss is not a finite number"
    )
