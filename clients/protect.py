"""What leaves a client, in one file.

A training result passes this chain and nothing else does: weight -> allow-list. Clipping, noise and masking
take their places here, in an order the privacy plan fixes. What is returned is the whole of what the server
learns: a delta, a weight and four numbers; and, where the run has control variates (SCAFFOLD), the change of
the client's own, a mean gradient.
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
    round_num: int,
    weighting: str,
    num_train: int,
    control_delta: torch.Tensor | None = None,
) -> ClientUpdate:
    """Return the update of one client from its training result.

    `rows` are those trained on; of them only counts are used. `weighting` is "examples" (the client's rows),
    "tokens" (supervised tokens of this round) or "uniform".

    Raises:
        NonFiniteError: training diverged; nothing is sent.
        ConfigError: the weighting is unknown.
    """
    if not is_finite(result):
        raise NonFiniteError(f"client {result.client_id}: the loss is not finite; lower train.learning-rate")
    num_supervised = sum(row.num_supervised for row in rows)
    weights = {"examples": float(num_train), "tokens": float(num_supervised), "uniform": 1.0}
    if weighting not in weights:
        raise ConfigError(f"aggregation.weighting = {weighting!r}: expected one of {', '.join(weights)}")
    return ClientUpdate(
        client_id=result.client_id,
        round_num=round_num,
        delta=result.delta.float(),
        weight=weights[weighting],
        num_tokens=result.num_tokens,
        train_loss=result.loss,
        num_truncated=sum(row.num_cut > 0 for row in rows),
        seconds=round(result.seconds, 3),
        control_delta=control_delta,
    )
