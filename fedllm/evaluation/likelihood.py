"""Likelihoods of continuations and texts under many adapters: one packed pass, each prompt computed once.

The rows of one question lie next to each other, so what they begin with alike, the prompt above all, is
computed once for all its choices (`fedllm.engine.flat_row`). Tokens are split as lm-evaluation-harness splits
them, so that its log-likelihoods are ours.
Tensor suffixes: N learnt token, V vocabulary, P adapter value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from fedllm.data.fields import Example
from fedllm.engine.engine import Engine
from fedllm.engine.flat_row import shared_prefix
from fedllm.engine.passes import MAX_ADAPTERS, Item, packed
from fedllm.errors import NoDataError
from fedllm.evaluation import task as tasks
from fedllm.evaluation.task import Ratio, Scores, share
from fedllm.models.base import BaseModel
from fedllm.models.chat import IGNORED, Encoded, chat_text, encode

TOP = 3  # a keyboard shows three words


@dataclass(frozen=True)
class RowScore:
    """One row under one adapter: its tokens' log-likelihood in nats, and how many were near the top."""

    log_likelihood: float
    num_tokens: int
    num_first: int  # tokens that are the likeliest
    num_top: int  # tokens among the likeliest TOP


def measure_choices(engine: Engine, adapters: Sequence[torch.Tensor], task: tasks.Task) -> list[Scores]:
    """Return the share of right answers under each adapter [P], by the likelihoods of the choices.

    `accuracy` compares the likelihoods as they are, `accuracy-normalised` divides them by the characters of
    the choice, which long choices need: lm-evaluation-harness's acc and acc_norm.
    """
    base = engine.base
    groups = [choice_rows(base, item.prompt, item.choices) for item in task.items]
    found = []
    for scored in score_rows(engine, adapters, groups):
        raw, normalised = [], []
        for item, rows in zip(task.items, scored, strict=True):
            sums = [row.log_likelihood for row in rows]
            raw.append(_best(sums) == item.right)
            lengths = map(len, item.choices)
            normalised.append(_best([a / b for a, b in zip(sums, lengths, strict=True)]) == item.right)
        found.append(Scores({"accuracy": share(raw), "accuracy-normalised": share(normalised)}))
    return found


def measure_texts(engine: Engine, adapters: Sequence[torch.Tensor], task: tasks.Task) -> list[Scores]:
    """Return loss (nats per token) and next-token hits under each adapter [P]; of plain text bits per byte.

    Of a conversation the answers count, as in training; of a plain text every token, the first predicted
    from the token that begins texts, in windows where it is longer than the model's context.

    Raises:
        NoDataError: fewer than two items have a token to predict.
    """
    base = engine.base
    groups = [text_rows(base, item.prompt) for item in task.items]
    used = [place for place, rows in enumerate(groups) if rows]
    if len(used) < 2:
        raise NoDataError(
            f"task {task.name}: the answers are beyond the model's context; shorten its prompts"
        )
    num_bytes = [len(task.items[place].prompt.text.encode()) for place in used]
    found = []
    for scored in score_rows(engine, adapters, [groups[place] for place in used]):
        tokens = [float(sum(row.num_tokens for row in rows)) for rows in scored]
        nats = [-sum(row.log_likelihood for row in rows) for rows in scored]
        figures = {"loss": Ratio(nats, tokens)}
        if all(num_bytes):
            figures["bits-per-byte"] = Ratio([nat / math.log(2) for nat in nats], num_bytes)
        figures["top-1"] = Ratio([float(sum(row.num_first for row in rows)) for rows in scored], tokens)
        figures[f"top-{TOP}"] = Ratio([float(sum(row.num_top for row in rows)) for rows in scored], tokens)
        found.append(Scores(figures))
    return found


def choice_rows(base: BaseModel, prompt: Example, choices: Sequence[str]) -> list[Encoded]:
    """Return a row for each choice after the prompt; only the choice's tokens are learnt.

    A choice follows a plain prompt after a space, and a user's turn as the beginning of the answer. What is
    longer than the model's context loses its beginning.
    """
    text, most = prompt_text(base.tokenizer, prompt), context_length(base)
    gap = "" if prompt.turns else " "
    # Spaces at the end of a prompt belong to the word that follows.
    stem = text.rstrip()
    wholes = _tokens(base.tokenizer, [stem, *(text + gap + choice for choice in choices)], prompt)
    num_given = len(wholes[0])
    rows = []
    for whole in wholes[1:]:
        labels = [IGNORED] * num_given + whole[num_given:]
        rows.append(Encoded(tuple(whole[-most - 1 :]), tuple(labels[-most - 1 :])))
    return rows


def text_rows(base: BaseModel, example: Example) -> list[Encoded]:
    """Return the rows that measure an example: none where its answer is beyond the model's context."""
    most = context_length(base)
    if example.turns:
        row = encode(example, base.tokenizer, most)
        return [] if row is None else [row]
    tokens = base.tokenizer(example.text, add_special_tokens=False)["input_ids"]
    begin = base.tokenizer.bos_token_id
    whole = [base.tokenizer.eos_token_id if begin is None else begin, *tokens]
    rows = []
    for start in range(1, len(whole), most):
        window = whole[max(0, min(start, len(whole) - most) - 1) : start + most]
        num_new = min(most, len(whole) - start)
        rows.append(Encoded(tuple(window), (IGNORED,) * (len(window) - num_new) + tuple(window[-num_new:])))
    return rows


def prompt_text(tokenizer: Any, prompt: Example) -> str:
    """Return the text after which a model answers."""
    return chat_text(tokenizer, prompt.turns, prompt_answer=True) if prompt.turns else prompt.text


def context_length(base: BaseModel) -> int:
    """Return how many tokens of a row the model can predict; a pass has a place for the last one too."""
    return int(getattr(base.model.config.get_text_config(), "max_position_embeddings", 0) or 2048) - 1


@torch.inference_mode()
def score_rows(
    engine: Engine, adapters: Sequence[torch.Tensor], groups: Sequence[Sequence[Encoded]]
) -> list[list[list[RowScore]]]:
    """Return the scores of every row of every group under every adapter [P]: [adapter][group][row].

    Rows of a group are neighbours in a pass and share what they begin with.
    """
    found: list[list[list[RowScore]]] = []
    for begin in range(0, len(adapters), MAX_ADAPTERS):
        held = adapters[begin : begin + MAX_ADAPTERS]
        engine.bank.load(engine.layout, held, [engine.layout.scale] * len(held))
        # The seed keeps questions apart: neighbours of one owner share only what all of them begin with.
        units = [
            [Item(row, place, 0, 1.0, seed=number) for row in group]
            for place in range(len(held))
            for number, group in enumerate(groups)
        ]
        done: list[list[RowScore]] = []
        with engine.passes.attached():
            for part in packed(units, list(map(_num_computed, units)), engine.limits.together):
                done += _scored(engine, part)
        found += [done[len(groups) * place : len(groups) * (place + 1)] for place in range(len(held))]
    return found


def _scored(engine: Engine, units: Sequence[Sequence[Item]]) -> list[list[RowScore]]:
    """Return the scores of the rows of one pass, by unit."""
    items = [item for unit in units for item in unit]
    columns: list[list[torch.Tensor]] = [[], []]
    together = [items] if engine.is_ragged else [[item] for item in items]
    chunks = (chunk for part in together for chunk in engine.passes.learnt_logits(part))
    for logits_NV, targets_N in chunks:
        chosen_N1 = logits_NV.gather(1, targets_N[:, None])
        columns[0].append((chosen_N1[:, 0] - logits_NV.logsumexp(dim=1)).double())
        columns[1].append((logits_NV > chosen_N1).sum(dim=1))  # how many tokens are likelier
    log_probs, ranks = (torch.cat(column).cpu() for column in columns)
    bounds = pairwise(accumulate((item.row.num_supervised for item in items), initial=0))
    rows = [
        RowScore(
            float(log_probs[begin:end].sum()),
            end - begin,
            int((ranks[begin:end] == 0).sum()),
            int((ranks[begin:end] < TOP).sum()),
        )
        for begin, end in bounds
    ]
    return [rows[begin:end] for begin, end in pairwise(accumulate(map(len, units), initial=0))]


def _num_computed(unit: Sequence[Item]) -> int:
    """Return how many tokens a pass computes for neighbours that share their beginning."""
    rows = [item.row for item in unit]
    return sum(len(row.tokens) for row in rows) - shared_prefix(rows) * (len(rows) - 1)


def _tokens(tokenizer: Any, texts: Sequence[str], prompt: Example) -> list[list[int]]:
    """Return texts as tokens; a chat template writes its special tokens itself."""
    special = not (prompt.turns and tokenizer.chat_template)
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    return rows


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
