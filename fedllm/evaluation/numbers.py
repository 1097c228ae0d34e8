"""Arithmetic: the model writes an answer, and the number in it is compared with the right one."""

import re
from collections.abc import Sequence
from decimal import Decimal

import torch

from fedllm.engine.engine import Engine
from fedllm.evaluation.likelihood import context_length, prompt_text
from fedllm.evaluation.task import Scores, Task, share

MAX_NEW_TOKENS = 256
_BATCH = 16  # answers written at once: more wait for the longest of them
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARK = "####"  # GSM8K writes the result of a solution after it


def final_number(text: str) -> str:
    """Return the number after the last `####`, else the last number of a text, "" where it has none.

    `1,200.0` and `1200` are the same number and are written alike.
    """
    for part in (text.rpartition(_MARK)[2] if _MARK in text else "", text):
        if found := _NUMBER.findall(part):
            chosen = found[0] if part is not text else found[-1]
            return f"{Decimal(chosen.replace(',', '')).normalize():f}"
    return ""


def measure_numbers(
    engine: Engine, adapters: Sequence[torch.Tensor], task: Task, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Scores]:
    """Return the share of right numbers under each adapter [P], and what was written for each item.

    A prompt that leaves no room for an answer in the model's context loses its beginning.
    """
    tokenizer, room = engine.base.tokenizer, context_length(engine.base)
    max_new_tokens = min(max_new_tokens, room // 2)
    special = not tokenizer.chat_template
    texts = [prompt_text(tokenizer, item.prompt) for item in task.items]
    beginnings = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
    beginnings = [tokens[max_new_tokens - room :] for tokens in beginnings]
    written = _written(engine, adapters, beginnings, max_new_tokens)
    found = []
    for place in range(len(adapters)):
        answers = written[place * len(texts) : (place + 1) * len(texts)]
        right = [
            final_number(answer) == item.number for answer, item in zip(answers, task.items, strict=True)
        ]
        found.append(Scores({"exact-match": share(right)}, tuple(answers)))
    return found


def _written(
    engine: Engine, adapters: Sequence[torch.Tensor], beginnings: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    """Return the greedy continuation of every beginning, adapter by adapter."""
    wanted = [(adapter, beginning) for adapter in adapters for beginning in beginnings]
    # Beginnings of one length lie together, so that few places are padding.
    order = sorted(range(len(wanted)), key=lambda place: len(wanted[place][1]))
    texts = [""] * len(wanted)
    for start in range(0, len(order), _BATCH):
        places = order[start : start + _BATCH]
        vectors, batch = zip(*(wanted[place] for place in places), strict=True)
        tokens = engine.continue_rows(engine.layout, vectors, batch, max_new_tokens, _likeliest)
        decoded = engine.base.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for place, text in zip(places, decoded, strict=True):
            texts[place] = text.strip()
    return texts


def _likeliest(rows: range, step_1: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    return logits_BV.argmax(dim=1)
