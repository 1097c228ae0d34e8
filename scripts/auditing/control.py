"""The positive control: one client's text learnt by heart, without protection. An audit must find that."""

from dataclasses import dataclass, replace

import torch

from fedllm.adapters.layout import initial_adapter
from fedllm.attacks.canaries import Canary
from fedllm.attacks.token_scores import whole
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.errors import NoDataError
from fedllm.messages import LocalTraining
from fedllm.models.base import layout_of
from fedllm.models.chat import Encoded
from scripts.auditing.opening import Case
from scripts.auditing.rows import sampled

RANK = 16  # at least
MEMBERS, OTHERS, CANARIES = 16, 64, 64  # at most
BATCH = 4
LEARNING_RATE = 3e-3  # of AdamW; much more and nothing is learnt by heart


@dataclass(frozen=True, eq=False)
class Control:
    """An adapter [P] that was over-fitted on `members` and on those of `canaries` that are included.

    `others` are rows of the same client that it has not seen.
    """

    engine: Engine
    vector: torch.Tensor
    members: tuple[Encoded, ...]
    others: tuple[Encoded, ...]
    canaries: tuple[Canary, ...]


def overfit(case: Case, epochs: int) -> Control:
    """Train the control on the client with most rows, half of them left out, `epochs` times over.

    It starts from the base model and has the layers and the scale of the run, but steps of its own: those of
    the run may be too few, or too long, to learn anything by heart.

    Raises:
        NoDataError: no client has two rows.
    """
    client = max(case.holder.clients.values(), key=lambda one: len(one.train) + len(one.held_out))
    rows = [*client.train, *client.held_out]
    if len(rows) < 2:
        raise NoDataError("no client has two rows, so no control can be trained on one and tried on another")
    pool = sampled(rows, len(rows), case.config.seed, "control")
    number = min(MEMBERS, len(rows) // 2)
    members, others = pool[:number], pool[number : number + OTHERS]
    canaries = tuple(c for c in case.canaries if c.client_id == client.client_id)[:CANARIES]
    engine = _engine(case)
    texts = (*members, *(whole(one.tokens) for one in canaries if one.included))
    vector = _trained(case, engine, texts, epochs)
    return Control(engine, vector, members, others, canaries)


def _engine(case: Case) -> Engine:
    """Return an engine of the run's layers and scale, at a rank that leaves room to learn by heart."""
    lora = case.config.lora
    rank = max(RANK, lora.rank)
    base = case.engine.base
    layout = layout_of(
        base.model, replace(lora, rank=rank, alpha=lora.alpha / lora.rank * rank), base.fingerprint
    )
    return Engine(base, layout, token_budget=case.config.train.token_budget)


def _trained(case: Case, engine: Engine, texts: tuple[Encoded, ...], epochs: int) -> torch.Tensor:
    seed = case.config.seed
    order = [row for epoch in range(epochs) for row in sampled(texts, len(texts), seed, f"epoch {epoch}")]
    batches = tuple(tuple(order[begin : begin + BATCH]) for begin in range(0, len(order), BATCH))
    start = initial_adapter(engine.layout, seed).vector
    training = LocalTraining(
        steps=len(batches),
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    (result,) = engine.train([Job("control", start, batches, training)])
    return start + result.delta.float()
