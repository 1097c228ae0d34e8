"""FlowerTune's rule for multiple choice, for comparison with its leaderboard only.

The model sees the lettered options and writes one token; the first letter or digit of it, whatever word it
begins, is taken for the choice. So "Answer" counts as option A, and the figure is mostly one of form
(flower's benchmarks/flowertune-llm/evaluation/general-nlp).
"""

import re
from collections.abc import Sequence

import torch

from fedllm.engine.engine import Engine
from fedllm.engine.passes import MAX_ADAPTERS, Item, split
from fedllm.evaluation import task as tasks
from fedllm.evaluation.likelihood import context_length
from fedllm.evaluation.task import Ratio, Task, share
from fedllm.models.chat import IGNORED, Encoded

FIGURE = "flowertune-rule"
_FORM = (
    "<|im_start|>question\nAnswer the following multiple choice question.\n{question}\n\n"
    "Options:\n{options}\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n"
)


@torch.inference_mode()
def measure_first_letter(engine: Engine, adapters: Sequence[torch.Tensor], task: Task) -> list[Ratio]:
    """Return the share of items whose right letter begins the one greedy token, under each adapter [P]."""
    rows = [_row(engine, item) for item in task.items]
    found = []
    for begin in range(0, len(adapters), MAX_ADAPTERS):
        held = adapters[begin : begin + MAX_ADAPTERS]
        engine.bank.load(engine.layout, held, [engine.layout.scale] * len(held))
        items = [Item(row, place, 0, 1.0) for place in range(len(held)) for row in rows]
        with engine.passes.attached():
            chunks = [
                logits_NV.argmax(dim=1)
                for part in split(items, engine.limits.together)
                for logits_NV, _ in engine.passes.learnt_logits(part)
            ]
        texts = engine.base.tokenizer.batch_decode(torch.cat(chunks)[:, None], skip_special_tokens=True)
        for place in range(len(held)):
            mine = texts[place * len(rows) : (place + 1) * len(rows)]
            found.append(
                share([first_letter(text) == item.right for text, item in zip(mine, task.items, strict=True)])
            )
    return found


def first_letter(text: str) -> int:
    """Return the place of the option that FlowerTune reads from what a model wrote, -1 for none."""
    letters = re.sub(r"[^a-zA-Z0-9]", "", text).lower()
    return ord(letters[0]) - ord("a") if letters and letters[0].isalpha() else -1


def _row(engine: Engine, item: tasks.Item) -> Encoded:
    """Return FlowerTune's prompt as a row whose last token stands for the one that the model is to write."""
    options = "\n".join(f"{chr(65 + place)}. {choice}" for place, choice in enumerate(item.choices))
    asked = item.prompt.turns[-1].content if item.prompt.turns else item.prompt.text
    question = asked.removesuffix("\nAnswer:")
    question += "" if question.endswith(("?", ".")) else "?"
    text = _FORM.format(question=question, options=options)
    tokens = engine.base.tokenizer(text)["input_ids"][-context_length(engine.base) :]
    return Encoded((*tokens, tokens[0]), (IGNORED,) * len(tokens) + (tokens[0],))
