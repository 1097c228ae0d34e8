"""What the server accepts from a client. A bad reply is dropped and named; it never touches the model."""

import math
from collections.abc import Mapping

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.messages import ClientAtHome, ClientEvaluation, ClientFailure, ClientUpdate

ROUNDING = 1.02  # what a lossy payload may add to a delta
LARGEST_LOSS = 1e6  # nats per token: far above any even guess, and finite in sums and squares
LARGEST_SECONDS = 1e9
UNSOUND = "refused"  # the code of an answer that holds other numbers than a client can honestly have


def find_fault(
    update: ClientUpdate,
    *,
    layout: AdapterLayout,
    round_num: int,
    largest_weights: Mapping[str, float],
    largest_move: float,
    largest_control: float = 0.0,
) -> str:
    """Return why an update is not sound, "" where it is.

    `layout` is that of the rank it was asked for; `largest_weights` bound the weight of the client, or of
    every member of a sum. A weighted mean of sound deltas moves no value further than they do.
    `largest_control` is the most by which a control variate can honestly change, in Euclidean norm.
    The codec has already checked magic, version, checksum, layout, part, size and round of its packets.
    """
    if update.round_num != round_num:
        return f"the update is of round {update.round_num}"
    if update.delta.shape != (layout.size,) or update.delta.dtype != torch.float32:
        return f"the delta is {update.delta.dtype} of {update.delta.numel()} values"
    lowest, highest = torch.aminmax(update.delta)  # both are NaN where any value is
    moved = max(-float(lowest), float(highest))
    if not math.isfinite(moved):
        return "the delta holds NaN or infinite values"
    if moved > ROUNDING * largest_move:
        return f"a value moved by {moved:.3g}, at most {largest_move:.3g} can be honest"
    control_fault = _control_fault(update.control_delta, largest_control)
    if control_fault:
        return control_fault
    for member in update.members:
        fault = _number_fault(member, largest_weights[member.client_id])
        if fault:
            return f"in the sum of its node, client {member.client_id}: {fault}"
    return "" if update.members else _number_fault(update, largest_weights[update.client_id])


def _control_fault(change_P: torch.Tensor | None, largest: float) -> str:
    norm = 0.0 if change_P is None else float(change_P.norm())
    if not math.isfinite(norm):
        return "the change of its control variate is not finite"
    if norm > ROUNDING * largest:
        return f"its control variate changed by {norm:.3g}, at most {largest:.3g} can be honest"
    return ""


def _number_fault(update: ClientUpdate, largest_weight: float) -> str:
    if not math.isfinite(update.weight) or update.weight <= 0:
        return f"the weight {update.weight:g} is not a positive number"
    if update.weight > largest_weight:
        return f"the weight {update.weight:g} is above the {largest_weight:g} declared at joining"
    if not 0 <= update.train_loss <= LARGEST_LOSS:  # NaN compares false, so it is refused too
        return f"the training loss is no number from 0 to {LARGEST_LOSS:g}"
    if not 0 <= update.seconds <= LARGEST_SECONDS:
        return f"the seconds of its training are no number from 0 to {LARGEST_SECONDS:g}"
    return ""


def check_at_home(answer: ClientAtHome, most_steps: int) -> ClientAtHome | ClientFailure:
    """Return what training on at home gave a client where it is sound, else why it is refused."""
    losses = (answer.alone, answer.shared, answer.home)
    if all(0 <= loss <= LARGEST_LOSS for loss in losses) and answer.steps <= most_steps:
        return answer
    reason = f"a loss is no number from 0 to {LARGEST_LOSS:g}, or it trained more than {most_steps:,} steps"
    return ClientFailure(client_id=answer.client_id, code=UNSOUND, reason=reason)


def check_evaluation(evaluation: ClientEvaluation) -> ClientEvaluation | ClientFailure:
    """Return the evaluation where it is sound, else why it is refused."""
    losses = [loss for loss in (evaluation.loss, evaluation.personal_loss) if loss is not None]
    if all(0 <= loss <= LARGEST_LOSS for loss in losses) and evaluation.num_tokens > 0:
        return evaluation
    reason = f"the held-out loss is no number from 0 to {LARGEST_LOSS:g}, or is of no token"
    return ClientFailure(client_id=evaluation.client_id, code=UNSOUND, reason=reason)
