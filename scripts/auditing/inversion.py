"""Which tokens can be read from the message that leaves a client, with a positive control."""

from dataclasses import asdict, replace
from typing import Any

import torch

from fedllm.attacks.inversion import (
    closest_tokens,
    first_projections,
    message_residuals,
    recovery,
    spanned_tokens,
    token_inputs,
)
from fedllm.attacks.token_scores import whole
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.messages import LocalTraining
from fedllm.models.chat import Encoded
from scripts.auditing.control import Control
from scripts.auditing.messages import Message, leaving_message
from scripts.auditing.opening import Case
from scripts.auditing.secret_messages import secret_messages, under_masks

CONTROL_TOKENS = 16  # of the one row whose gradient the positive control gives away


def inversion_report(case: Case, control: Control) -> dict[str, Any]:
    """Return token precision, recall and F1 of the span check on a message and on its positive control.

    `closest` takes as many tokens as there are, which an attacker may know; `spanned` those that fit. The
    same guesses are compared with a client's held-out rows (`held_out`): common tokens are guessed right
    there too. Under secret sums the message is the sum that the server learns, and one client's own is
    attacked as well, masked and in plain. The positive control is the gradient of one row of 16 tokens,
    unprotected, at rank 16 or more; under secret sums it is attacked under masks too.
    """
    layout = case.holder.engine.layout
    if not first_projections(layout):
        return {"skipped": "no query, key or value of the first layer is trained, so nothing can be tested"}
    is_secret = case.holder.plan.secure is not None
    messages = secret_messages(case) if is_secret else [leaving_message(case)]
    message = messages[0]
    inputs_VD = _inputs(case.holder.engine)
    held_out = [row for name in message.clients for row in case.holder.clients[name].held_out] or list(
        case.others
    )
    vectors = [(name, one, vector_P) for one in messages for name, vector_P in one.vectors.items()]
    return {
        "clients": list(message.clients),
        "part": message.part,
        "codec": case.config.wire.codec,
        "num_rows": len(message.rows),
        "num_tokens": sum(len(row.tokens) for row in message.rows),
        "run": {
            name: _recovered(inputs_VD, one, vector_P, _tokens_of(one.rows))
            for name, one, vector_P in vectors
        },
        "held_out": {
            name: _recovered(inputs_VD, one, vector_P, _tokens_of(held_out), _tokens_of(one.rows))
            for name, one, vector_P in vectors
        },
        "positive_control": _control_report(control, inputs_VD, is_secret=is_secret),
    }


def _inputs(engine: Engine) -> torch.Tensor:
    number = first_projections(engine.layout)[0]
    return token_inputs(engine.base, engine.layout.matrices[number].module)


def _tokens_of(rows: tuple[Encoded, ...] | list[Encoded]) -> frozenset[int]:
    """Return the tokens that a model reads in training: nothing is predicted from a row's last."""
    return frozenset(token for row in rows for token in row.tokens[:-1])


def _recovered(
    inputs_VD: torch.Tensor,
    message: Message,
    vector_P: torch.Tensor,
    true: frozenset[int],
    known: frozenset[int] | None = None,
) -> dict[str, Any]:
    """Return how well `true` is recovered by an attacker who knows how many tokens there are in `known`."""
    matrices = first_projections(message.layout)
    residuals_V = message_residuals(inputs_VD, message.layout, message.start, vector_P, matrices)
    number = len(true if known is None else known)
    return {
        "closest": asdict(recovery(closest_tokens(residuals_V, number), true)),
        "spanned": asdict(recovery(spanned_tokens(residuals_V), true)),
        "chance": number / len(residuals_V),
    }


def _control_report(control: Control, inputs_VD: torch.Tensor, *, is_secret: bool) -> dict[str, Any]:
    layout = control.engine.layout
    row = whole(control.others[0].tokens[:CONTROL_TOKENS])
    training = LocalTraining(steps=1, batch_size=1, learning_rate=1e-3, weight_decay=0.0, clip_norm=0.0)
    job = Job("control", control.vector, ((row,),), training)
    # A correction of zero changes nothing, and makes the job tell its gradient.
    (result,) = control.engine.train([replace(job, correction=torch.zeros_like(control.vector))])
    assert result.gradient is not None
    message = Message((), "both", layout, control.vector, {}, (row,))
    true, gradient_P = _tokens_of([row]), result.gradient.float()
    found = _recovered(inputs_VD, message, gradient_P, true)
    if is_secret:  # the same message, which gives its tokens away, as a server has it in such a run
        found["masked"] = _recovered(inputs_VD, message, under_masks(gradient_P), true)
    return {**found, "rank": layout.rank, "num_tokens": len(row.tokens)}
