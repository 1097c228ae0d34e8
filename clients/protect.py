"""What leaves a client, in one file.

A training result passes this chain and nothing else does, in an order the privacy plan fixes:

    weight -> clip -> noise -> allow-list -> compress (`fedllm/wire/packets.py`; masking takes its place
    before)

What is returned is the whole of what the server learns: a delta, a weight and four numbers, which are zeros
where the plan withholds them; and, where the run has control variates (SCAFFOLD), the change of the client's
own, a mean gradient. Where a server asks a node for the sum of its clients, their deltas leave as one
weighted mean. Without a privacy plan nothing is clipped and no noise is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.parts import part_size, whole_of
from fedllm.engine.jobs import Result, is_finite
from fedllm.errors import ConfigError, NonFiniteError
from fedllm.messages import ClientUpdate
from fedllm.models.chat import Encoded
from fedllm.privacy.keys import bits_digest, derived_key
from fedllm.privacy.noise import SecretStream, clipped, gaussian


@dataclass(frozen=True)
class Protection:
    """What the privacy plan asks of one client in one round.

    Its delta is clipped to `clip`, and where `deviation` is above 0, Gaussian noise of it is added to the
    values of `part` (`layout` is that of the client's rank) under the secret `key`. A `clip` of 0 is of a
    result that was private when it came (DP-SGD). `weight_cap` is the number of rows from which a client
    counts fully. `with_numbers` lets losses, counts and seconds leave.
    """

    layout: AdapterLayout
    part: str
    clip: float = 0.0
    deviation: float = 0.0
    key: bytes = b""
    weight_cap: float = 0.0
    with_numbers: bool = False


def protect(
    result: Result,
    rows: Sequence[Encoded],
    *,
    rank: int,
    round_num: int,
    weighting: str,
    num_train: int,
    control_delta: torch.Tensor | None = None,
    protection: Protection | None = None,
) -> ClientUpdate:
    """Return the update of one client, trained at `rank`, from its training result.

    `rows` are those trained on; of them only counts are used. `weighting` is "examples" (the client's rows),
    "tokens" (supervised tokens of this round), "uniform", or "product-norm", which the server measures.
    A result to be clipped that holds NaN or infinity counts as zero: failing would tell the server.

    Raises:
        NonFiniteError: training diverged and nothing is clipped; nothing is sent.
        ConfigError: the weighting is unknown.
    """
    is_clipped = protection is not None and protection.clip > 0
    if not is_clipped and not is_finite(result):
        raise NonFiniteError(f"client {result.client_id}: the loss is not finite; lower train.learning-rate")
    has_numbers = protection is None or (protection.with_numbers and is_finite(result))
    return ClientUpdate(
        client_id=result.client_id,
        round_num=round_num,
        rank=rank,
        delta=_protected_delta(result, protection, round_num),
        weight=_weight(rows, weighting, num_train, protection),
        num_tokens=result.num_tokens if has_numbers else 0,
        train_loss=result.loss if has_numbers else 0.0,
        num_truncated=sum(row.num_cut > 0 for row in rows) if has_numbers else 0,
        seconds=round(result.seconds, 3) if has_numbers else 0.0,
        control_delta=control_delta,
    )


def _weight(rows: Sequence[Encoded], weighting: str, num_train: int, protection: Protection | None) -> float:
    num_supervised = sum(row.num_supervised for row in rows)
    weights = {"examples": float(num_train), "tokens": float(num_supervised)}
    weights |= dict.fromkeys(("uniform", "product-norm"), 1.0)
    if weighting not in weights:
        raise ConfigError(f"aggregation.weighting = {weighting!r}: expected one of {', '.join(weights)}")
    cap = protection.weight_cap if protection is not None else 0.0
    return min(1.0, num_train / cap) if cap else weights[weighting]


def _protected_delta(result: Result, protection: Protection | None, round_num: int) -> torch.Tensor:
    """Return the delta [P] clipped and noised: clipped first, or its noise would be clipped as well."""
    if protection is None or not protection.clip:
        return result.delta.float()
    delta_P = clipped(result.delta, protection.clip)
    if not protection.deviation:
        return delta_P
    amount = (protection.part, repr(protection.deviation))
    key = derived_key(protection.key, "update", result.client_id, round_num, *amount, bits_digest(delta_P))
    size = part_size(protection.layout, protection.part)
    noise = gaussian(SecretStream(key), size, protection.deviation)
    return (delta_P.double() + whole_of(protection.layout, noise, protection.part)).float()


def node_mean(updates: Sequence[ClientUpdate]) -> torch.Tensor:
    """Return the weighted mean [P] of the deltas of clients of one rank, summed in float64."""
    total = sum(update.weight for update in updates)
    mean_P = torch.zeros(max((update.delta.numel() for update in updates), default=0), dtype=torch.float64)
    for update in updates:
        mean_P.add_(update.delta, alpha=update.weight / total)
    return mean_P.float()
