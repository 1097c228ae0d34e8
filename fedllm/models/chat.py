"""Turns an example into tokens and labels: what the model reads, and which tokens it must learn.

Labels are -100 on everything but the answer, and an end token is always learnt, so that a tuned model stops.
Models with a chat template are prompted through it; others through the Alpaca form below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from fedllm.data.fields import Example, Turn
from fedllm.errors import DataError

IGNORED = -100
ALPACA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """One row of tokens: `tokens` and `labels` of equal length, -100 where nothing is learnt."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    num_cut: int = 0  # tokens lost to the length limit

    @property
    def learnt_tokens(self) -> list[int]:
        """The tokens whose prediction is learnt (the first token has no prediction)."""
        return [label for label in self.labels[1:] if label != IGNORED]

    @property
    def num_supervised(self) -> int:
        """Number of tokens whose prediction is learnt."""
        return len(self.learnt_tokens)


def encode(example: Example, tokenizer: Any, max_length: int) -> Encoded | None:
    """Return the row of `example`, cut to `max_length` tokens.

    None where no answer token is left, or the model's chat template takes no such conversation.
    """
    try:
        text, spans = _render(example, tokenizer)
    except DataError:
        return None
    # A chat template writes its own special tokens; a plain text or the Alpaca form does not.
    templated = bool(example.turns) and bool(tokenizer.chat_template)
    encoding = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    learnt = [
        end > begin and any(low < end and begin < high for low, high in spans)
        for begin, end in encoding["offset_mapping"]
    ]
    if not any(learnt):
        return None
    # What follows the last learnt token is never predicted from, so it is left out. Where the template
    # does not close the answer with the end token, that token is added: a tuned model must know to stop.
    stop = len(learnt) - learnt[::-1].index(True)
    tokens = list(encoding["input_ids"][:stop])
    labels = [token if flag else IGNORED for token, flag in zip(tokens, learnt, strict=False)]
    if tokenizer.eos_token_id is not None and tokens[-1] not in _end_tokens(tokenizer):
        tokens.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    num_cut = max(0, len(tokens) - max_length)
    row = Encoded(tuple(tokens[:max_length]), tuple(labels[:max_length]), num_cut)
    return row if row.num_supervised else None


def chat_text(tokenizer: Any, turns: Sequence[Turn], *, prompt_answer: bool = False) -> str:
    """Return a conversation as text; `prompt_answer` adds the header of the answer to come.

    Raises:
        DataError: the model's chat template refuses it: some take no system turn, or no two of one role.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    template = None if tokenizer.chat_template else ALPACA_TEMPLATE
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt_answer
        )
    except TemplateError:  # its message may quote a turn, so it is not passed on
        roles = ", ".join(turn.role for turn in turns)
        raise DataError(f"the model's chat template refuses a conversation of {roles}") from None
    return str(text)


def form_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of a conversation of empty turns: those that every conversation has."""
    text = chat_text(tokenizer, [Turn("user", ""), Turn("assistant", "")])
    return tuple(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def _end_tokens(tokenizer: Any) -> set[int]:
    """Return the ids that end an answer: the end token and every special token, such as <|im_end|>."""
    return {tokenizer.eos_token_id, *tokenizer.all_special_ids}


def _render(example: Example, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of an example and the character spans the model must learn.

    Some templates rewrite earlier answers once a later turn follows (they drop its reasoning, say). Such an
    answer has no span of its own in the whole conversation and is not learnt.
    """
    if not example.turns:
        return example.text, [(0, len(example.text))]
    whole = chat_text(tokenizer, example.turns)
    spans = []
    for index, turn in enumerate(example.turns):
        if turn.role == "assistant":
            prompt = chat_text(tokenizer, example.turns[:index], prompt_answer=True)
            answered = chat_text(tokenizer, example.turns[: index + 1]).rstrip()
            if whole.startswith(answered) and answered.startswith(prompt):
                spans.append((len(prompt), len(answered)))
    return whole, spans
