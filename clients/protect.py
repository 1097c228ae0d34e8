"""What leaves a client, in one file.

A training result passes this chain and nothing else does: weight -> allow-list. Clipping, noise and masking
take their places here, in an order the privacy plan fixes. What is returned is the whole of what the server
learns: a delta, a weight and four numbers; and, where the run has control variates (SCAFFOLD), the change of
the client's own, a mean gradient. Where a server asks a node for the sum of its clients, their deltas leave
as one weighted mean.
"""

from collections.abc import Sequence

import torch

from fedllm.errors import ConfigError, NonFiniteError
from fedllm.models.chat import Encoded
from fedllm.training.jobs import Result, is_finite
from fedllm.types import ClientUpdate


def protect(
    result: Result,
    rows: Sequence[Encoded],
    *,
    rank: int,
    round_num: int,
    weighting: str,
    num_train: int,
    control_delta: torch.Tensor | None = None,
) -> ClientUpdate:
    """Return the update of one client, trained at `rank`, from its training result.

    `rows` are those trained on; of them only counts are used. `weighting` is "examples" (the client's rows),
    "tokens" (supervised tokens of this round), "uniform", or "product-norm", which the server measures.

    Raises:
        NonFiniteError: training diverged; nothing is sent.
        ConfigError: the weighting is unknown.
    """
    if not is_finite(result):
        raise NonFiniteError(f"client {result.client_id}: the loss is not finite; lower train.learning-rate")
    num_supervised = sum(row.num_supervised for row in rows)
    weights = {"examples": float(num_train), "tokens": float(num_supervised)}
    weights |= dict.fromkeys(("uniform", "product-norm"), 1.0)
    if weighting not in weights:
        raise ConfigError(f"aggregation.weighting = {weighting!r}: expected one of {', '.join(weights)}")
    return ClientUpdate(
        client_id=result.client_id,
        round_num=round_num,
        rank=rank,
        delta=result.delta.float(),
        weight=weights[weighting],
        num_tokens=result.num_tokens,
        train_loss=result.loss,
        num_truncated=sum(row.num_cut > 0 for row in rows),
        seconds=round(result.seconds, 3),
        control_delta=control_delta,
    )


def node_mean(updates: Sequence[ClientUpdate]) -> torch.Tensor:
    """Return the weighted mean [P] of the deltas of clients of one rank, summed in float64."""
    total = sum(update.weight for update in updates)
    mean_P = torch.zeros(max((update.delta.numel() for update in updates), default=0), dtype=torch.float64)
    for update in updates:
        mean_P.add_(update.delta, alpha=update.weight / total)
    return mean_P.float()
