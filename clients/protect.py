"""What leaves a client, in one file.

A training result passes this chain and nothing else does, in an order the privacy plan fixes:

    weight -> clip -> noise -> allow-list -> techniques -> compress (`fedllm/wire/packets.py`; masking takes
    its place before)

What is returned is the whole of what the server learns: a delta, a weight and four numbers, which are zeros
where the plan withholds them; and, where the run has control variates (SCAFFOLD), the change of the client's
own, a mean gradient. Where a server asks a node for the sum of its clients, their deltas leave as one
weighted mean. Without a privacy plan nothing is clipped, no noise is added, and a technique may still change
an update (a sparser delta, say); under one no technique may.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from clients.privacy import update_key
from clients.technique import ClientWork, NodeRound, Works, failure_of
from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.parts import part_size, whole_of
from fedllm.engine.jobs import Result, is_finite
from fedllm.errors import ConfigError, NonFiniteError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.models.chat import Encoded
from fedllm.privacy.keys import bits_digest, derived_key
from fedllm.privacy.noise import SecretStream, clipped, gaussian

_logger = logging.getLogger("fedllm.clients")


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What may leave one client in one round.

    Its delta, of `layout` (that of the client's rank), is clipped to `clip`, and where `deviation` is above
    0, Gaussian noise of it is added to the values of `part` under the secret `key`. `clip` is 0 where there
    is no privacy plan, and infinite where the result was private when it came (DP-SGD).
    `with_numbers` lets losses, counts and seconds leave. `weighting` is "examples" (the client's rows),
    "tokens" (supervised tokens of this round), "uniform", or "product-norm", which the server measures; where
    `weight_cap` is above 0, a client counts by its rows instead, and fully from so many on.
    """

    layout: AdapterLayout
    part: str
    weighting: str
    with_numbers: bool
    clip: float = 0.0
    deviation: float = 0.0
    key: bytes = b""
    weight_cap: float = 0.0


def protect_clients(this_round: NodeRound, works: Works) -> tuple[Works, dict[str, ClientFailure]]:
    """Return the work of each client with what leaves it, and those whose training diverged as failures."""
    protected, failed = [], {}
    for work in works:
        rows, num_train = [row for batch in work.job.batches for row in batch], work.client.num_rows
        protection = protection_of(this_round, work)
        if protection.clip and not is_finite(work.trained):  # heard on this machine alone
            _logger.warning("client %s: training diverged and counts as zero", work.client.client_id)
        try:
            update = protect(work.trained, rows, num_train, this_round.request.round_num, protection)
            protected.append(replace(work, update=update))
        except NonFiniteError as error:
            failed[work.client.client_id] = failure_of(work.client.client_id, error)
    # Last, so that a technique sees what the server will see (SCAFFOLD), or thins it out.
    done: Works = protected
    for technique in this_round.techniques:
        changed = technique.after(this_round, done)
        is_same = [one.update is other.update for one, other in zip(done, changed, strict=True)]
        # Noise was sized for exactly this update: anything added to it is not accounted for.
        if this_round.holder.plan.privacy is not None and not all(is_same):
            raise RuntimeError(f"{technique.name} changes an update that the privacy plan has protected")
        done = changed
    return done, failed


def protection_of(this_round: NodeRound, work: ClientWork) -> Protection:
    """Return what the plan lets leave a client."""
    layout = work.job.layout or this_round.layout
    plan, part, weighting = this_round.holder.plan.privacy, this_round.returned, this_round.weighting
    if plan is None:
        return Protection(layout=layout, part=part, weighting=weighting, with_numbers=True)
    clip = this_round.request.clip if plan.is_central else plan.clip  # a central clip may follow the norms
    return Protection(
        layout=layout,
        part=part,
        weighting=weighting,
        with_numbers=plan.metrics == "all",
        clip=math.inf if plan.is_by_example else clip,  # DP-SGD has clipped every row already
        deviation=plan.multiplier() * plan.clip if plan.is_local_client else 0.0,
        key=update_key(this_round, work.client) if plan.is_local_client else b"",
        weight_cap=plan.weight_cap,
    )


def protect(
    result: Result, rows: Sequence[Encoded], num_train: int, round_num: int, protection: Protection
) -> ClientUpdate:
    """Return the update of a client that has `num_train` rows, from its training result.

    `rows` are those trained on; of them only counts are used. Under a privacy plan a result that holds NaN or
    infinity counts as zero: failing would tell the server, and for nothing.

    Raises:
        NonFiniteError: training diverged, without a privacy plan; nothing is sent.
        ConfigError: the weighting is unknown.
    """
    # A private result counts as zero instead: a failure would be a message without noise, or uncharged.
    if not protection.clip and not is_finite(result):
        raise NonFiniteError(f"client {result.client_id}: the loss is not finite; lower train.learning-rate")
    has_numbers = protection.with_numbers and is_finite(result)
    return ClientUpdate(
        client_id=result.client_id,
        round_num=round_num,
        rank=protection.layout.rank,
        delta=_protected_delta(result, protection, round_num),
        weight=_weight(rows, num_train, protection),
        num_tokens=result.num_tokens if has_numbers else 0,
        train_loss=result.loss if has_numbers else 0.0,
        num_truncated=sum(row.num_cut > 0 for row in rows) if has_numbers else 0,
        seconds=round(result.seconds, 3) if has_numbers else 0.0,  # finer times would tell more of the rows
    )


def _weight(rows: Sequence[Encoded], num_train: int, protection: Protection) -> float:
    num_supervised = sum(row.num_supervised for row in rows)
    weights = {"examples": num_train, "tokens": num_supervised, "uniform": 1, "product-norm": 1}
    if protection.weighting not in weights:
        raise ConfigError(
            f"aggregation.weighting = {protection.weighting!r}: expected one of {', '.join(weights)}"
        )
    cap = protection.weight_cap  # a bound on what one client may weigh, so what the accounting counts on
    return min(1.0, num_train / cap) if cap else float(weights[protection.weighting])


def _protected_delta(result: Result, protection: Protection, round_num: int) -> torch.Tensor:
    """Return the delta [P] clipped and noised: clipped first, or its noise would be clipped as well."""
    if not protection.clip:
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
