"""Turns an example into tokens and labels: what the model reads, and which tokens it must learn.

Labels are -100 on everything but the answer, and an end token is always learnt, so that a tuned model stops.
Models with a chat template are prompted through it; others through the Alpaca form below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError

from fedllm.data.fields import Example, Turn
from fedllm.errors import DataError, ModelError
from fedllm.models.files import first_line

IGNORED = -100
# Why nothing is learnt from an example (`NoRow`).
CUT, REFUSED, NO_ANSWER, UNKNOWN_TOKEN = "cut", "refused", "no-answer", "unknown-token"
ALPACA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
# What a template raises: jinja's errors, and those of the Python that it calls.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


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

    @cached_property
    def num_supervised(self) -> int:
        """Number of tokens whose prediction is learnt."""
        return int(np.count_nonzero(self.arrays[1, 1:] != IGNORED))

    @cached_property
    def arrays(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens and labels as an array [2, length]: every step of every pass reads them."""
        return np.array((self.tokens, self.labels), dtype=np.int64)


@dataclass(frozen=True)
class NoRow:
    """Why nothing is learnt from an example.

    `cause` is CUT: no answer token is within the length limit (`length` is that of the whole row); REFUSED:
    the model's chat template takes no such conversation; NO_ANSWER: it leaves the answer out; UNKNOWN_TOKEN:
    the model has no embedding for a token.
    """

    cause: str
    length: int = 0


def encode(example: Example, tokenizer: Any, max_length: int) -> Encoded | None:
    """Return the row of `example`, cut to `max_length` tokens; None where nothing is learnt from it."""
    row = encode_or_cause(example, tokenizer, max_length)
    return row if isinstance(row, Encoded) else None


def encode_or_cause(
    example: Example, tokenizer: Any, max_length: int, num_embeddings: int | None = None
) -> Encoded | NoRow:
    """Return the row of `example`, cut to `max_length` tokens, or why there is none.

    A system turn that the model's chat template refuses goes at the head of the user's next turn. Tokens from
    `num_embeddings` on are none of the model's.
    """
    try:
        text, spans = _render(example, tokenizer)
    except DataError:
        return NoRow(REFUSED)
    # A chat template writes its own special tokens; a plain text or the Alpaca form does not.
    templated = bool(example.turns) and bool(tokenizer.chat_template)
    encoding = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    learnt = [
        end > begin and any(low < end and begin < high for low, high in spans)
        for begin, end in encoding["offset_mapping"]
    ]
    if not any(learnt):
        return NoRow(NO_ANSWER)
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
    if not row.num_supervised:
        return NoRow(CUT, len(tokens))
    if num_embeddings is not None and max(row.tokens) >= num_embeddings:
        return NoRow(UNKNOWN_TOKEN)
    return row


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
    except _TEMPLATE_ERRORS:  # its message may quote a turn, so it is not passed on
        roles = ", ".join(turn.role for turn in turns)
        raise DataError(f"the model's chat template refuses a conversation of {roles}") from None
    return str(text)


def check_template(tokenizer: Any) -> None:
    """Refuse a chat template that no conversation can go through.

    Raises:
        ModelError: it has a syntax error, fails on a question and its answer, or is one of several of which
            none is the default.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise ModelError(
            f"the model has several chat templates ({', '.join(sorted(templates))}), none of them"
            " named default; keep one alone, in chat_template.jinja"
        )
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    try:
        if templates:
            tokenizer.apply_chat_template(messages, tokenize=False)
            tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    except _TEMPLATE_ERRORS as error:  # it can quote nothing but the template and the question above
        is_syntax = isinstance(error, TemplateSyntaxError)
        what = "has a syntax error" if is_syntax else "is broken: it fails on a question and its answer"
        raise ModelError(
            f"the model's chat template {what} ({first_line(error)}); mend chat_template.jinja or"
            " tokenizer_config.json, or take the model's files anew"
        ) from None


def fate_of_system(tokenizer: Any) -> str:
    """Return what a system turn comes to in the model's chat template: "written", "refused" or "left out"."""
    turns = [Turn("system", "Be brief."), Turn("user", "Why?"), Turn("assistant", "So.")]
    try:
        return "written" if turns[0].content in chat_text(tokenizer, turns) else "left out"
    except DataError:
        return "refused"


def opens_answer(tokenizer: Any) -> bool:
    """Return whether prompts end with more than answers begin with, as a tag that opens a thought."""
    turns = [Turn("user", "Why?"), Turn("assistant", "So.")]
    return not chat_text(tokenizer, turns).startswith(chat_text(tokenizer, turns[:1], prompt_answer=True))


def form_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of a conversation of empty turns: those that every conversation has.

    There are none where the model's chat template takes no empty turn.
    """
    try:
        text = chat_text(tokenizer, [Turn("user", ""), Turn("assistant", "")])
    except DataError:
        return ()
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
    turns = example.turns
    try:
        whole = chat_text(tokenizer, turns)
    except DataError:
        turns = _without_system(turns)
        whole = chat_text(tokenizer, turns)
    spans = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and turn.learnt:
            prompt = chat_text(tokenizer, turns[:index], prompt_answer=True)
            answered = chat_text(tokenizer, turns[: index + 1]).rstrip()
            # Some prompts open a thought that a written answer does not have: it begins where they part.
            begin = _parting(prompt, answered)
            has_header = begin == len(prompt) or begin > len(chat_text(tokenizer, turns[:index]))
            if whole.startswith(answered) and has_header:
                spans.append((begin, len(answered)))
    return whole, spans


def _parting(first: str, second: str) -> int:
    """Return the place of the first character in which two texts differ, else the length of the shorter."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _without_system(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return turns with the system's words at the head of the user's next turn, as Gemma's makers advise."""
    kept: list[Turn] = []
    said: list[str] = []
    for turn in turns:
        if turn.role == "system":
            said.append(turn.content)
        elif turn.role == "user" and said:
            kept.append(Turn("user", "\n\n".join([*said, turn.content])))
            said = []
        else:
            kept.append(turn)
    return tuple(kept)
