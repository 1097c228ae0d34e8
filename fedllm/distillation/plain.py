"""The plain twin of teacher and student: PEFT, one row at a time, the whole softmax. Read this first.

It keeps what the fast path never does, every teacher's distribution over the whole vocabulary. Tests assert
that both agree. Tensor suffixes: K teacher, T token of a row, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.distillation.student import StudentTraining, student_batches
from fedllm.distillation.teacher import Teacher
from fedllm.models.base import BaseModel
from fedllm.models.chat import IGNORED, Encoded


def teach_plainly(
    base: BaseModel, teacher: Teacher, rows: Sequence[Encoded], *, hindsight: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return for each row the log-probabilities [T, V] at its learnt tokens, and the weights [T, K]."""
    said: list[list[torch.Tensor]] = [[] for _ in rows]
    for vector in teacher.adapters:
        with plain_model(base, teacher.layout, vector) as (model, _), torch.no_grad():
            for place, row in enumerate(rows):
                said[place].append(row_logits(model, row))
    return [
        _mixed(teacher, row, torch.stack(logits), hindsight) for row, logits in zip(rows, said, strict=True)
    ]


def _mixed(
    teacher: Teacher, row: Encoded, logits_KTV: torch.Tensor, hindsight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities [T, V] and the weights [T, K] of one row, token by token."""
    number = len(teacher.adapters)
    if teacher.kind == "logit-mean":
        log_probs_TV = logits_KTV.mean(dim=0).log_softmax(dim=1)
        return log_probs_TV, torch.full((len(log_probs_TV), number), 1 / number, dtype=torch.float64)
    log_probs_KTV = logits_KTV.log_softmax(dim=2).double()
    priors_K = teacher.priors.double().to(logits_KTV.device)
    said_TK = torch.stack([log_probs_KTV[:, t, token] for t, token in enumerate(row.learnt_tokens)])
    mixtures, weights = [], []
    for t in range(len(said_TK)):
        seen_TK = said_TK if hindsight else said_TK[:t]  # without it a token tells nothing about itself
        if teacher.kind == "posterior":
            posterior_K = (priors_K.log() + teacher.temper * seen_TK.sum(dim=0)).softmax(dim=0)
            weight_K = (1 - teacher.floor) * posterior_K + teacher.floor / number
        else:
            weight_K = torch.full_like(priors_K, 1 / number)
        mixtures.append((weight_K[:, None] * log_probs_KTV[:, t].exp()).sum(dim=0).log())
        weights.append(weight_K)
    return torch.stack(mixtures), torch.stack(weights)


def distil_plainly(
    base: BaseModel,
    start: AdapterState,
    rows: Sequence[Encoded],
    log_probs: Sequence[torch.Tensor],
    training: StudentTraining,
) -> torch.Tensor:
    """Return the change [P] of `start` after learning the rows' whole log-probabilities [T, V]."""
    taught = dict(zip(rows, log_probs, strict=True))
    with plain_model(base, start.layout, start.vector) as (model, parameters):
        rate, decay = training.learning_rate, training.weight_decay
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=decay)
        for batch in student_batches(rows, training):
            mine_NV = torch.cat([row_logits(model, row).log_softmax(dim=1) for row in batch])
            theirs_NV = torch.cat([taught[row] for row in batch])
            loss = (theirs_NV.exp() * (theirs_NV - mine_NV)).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if training.clip_norm:
                torch.nn.utils.clip_grad_norm_(parameters, training.clip_norm)
            optimizer.step()
        after = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    return after - start.vector.to(after)


@contextmanager
def plain_model(
    base: BaseModel, layout: AdapterLayout, vector: torch.Tensor
) -> Iterator[tuple[Any, list[torch.nn.Parameter]]]:
    """Within the block, yield PEFT's model with an adapter [P] on it, and its parameters in layout order."""
    modules = [matrix.module for matrix in layout.matrices]
    lora = LoraConfig(r=layout.rank, lora_alpha=layout.alpha, target_modules=modules, lora_dropout=0.0)
    model = get_peft_model(base.model, lora, autocast_adapter_dtype=False)
    named = dict(model.named_parameters())
    parameters = [named[spec.name.replace(".weight", ".default.weight")] for spec in layout.tensors]
    with torch.no_grad():
        for parameter, (_, view) in zip(parameters, layout.views(vector), strict=True):
            parameter.copy_(view)
    try:
        yield model, parameters
    finally:
        model.unload()


def row_logits(model: Any, row: Encoded) -> torch.Tensor:
    """Return the logits [T, V] that predict the learnt tokens of a row."""
    places = [place - 1 for place, label in enumerate(row.labels) if place and label != IGNORED]
    tokens_1t = torch.tensor([row.tokens], device=model.device)
    logits_TV: torch.Tensor = model(input_ids=tokens_1t).logits[0, places]
    return logits_TV
