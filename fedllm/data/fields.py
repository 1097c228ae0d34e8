"""Turns a row into a training example: which of its columns are the prompt and the answer, or the text.

Columns are recognised by the names that public data sets use, in any case of letters; the three mapping keys
`data.prompt-column`, `data.response-column` and `data.text-column` win over that.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.errors import ConfigError, DataError

_CONVERSATIONS = ("messages", "conversations")
# (prompt, response) in order of preference; an instruction may come with the text it is about
_PAIRS = (
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "response"),
)
_SUBJECTS = ("input", "context")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_KEYS = "data.prompt-column and data.response-column, or data.text-column"
_PLAIN_NAME = re.compile(r"[^\W\d][\w.-]{0,39}")
_MOST_NAMES = 20


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One training example: `turns` ending with the assistant's, or `text` to be learnt whole."""

    turns: tuple[Turn, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands and why. Never what it says."""

    file: str
    line: int  # from 1; the row number where a format has no lines
    reason: str


@dataclass(frozen=True)
class ClientRows:
    """The rows of one data holder, split once and for all by the run's seed."""

    client_id: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


@dataclass(frozen=True)
class Fields:
    """The columns of a row: `conversation`, or `prompt` (and `subject`) and `response`, or `text`."""

    conversation: str = ""
    prompt: str = ""
    subject: str = ""  # optional text that the prompt is about, as Alpaca's `input`
    response: str = ""
    text: str = ""


class RowProblem(Exception):
    """Why one row cannot be used; the message never holds text of the row."""


def detect_fields(
    columns: Iterable[str], *, prompt_column: str = "", response_column: str = "", text_column: str = ""
) -> Fields:
    """Return the fields that the mapping names or, without one, the first usual ones among `columns`.

    Args:
        columns: the column names of all rows together.
        prompt_column: exact name of the prompt's column; empty = detect.
        response_column: exact name of the answer's column; empty = detect.
        text_column: exact name of a column of plain text; empty = detect.

    Raises:
        ConfigError: the mapping names half a pair, or a pair and a text.
        DataError: a mapped column is absent, or nothing is recognised.
    """
    present = tuple(dict.fromkeys(columns))
    if prompt_column or response_column or text_column:
        return _mapped(present, prompt_column, response_column, text_column)
    by_name = {name.lower(): name for name in reversed(present)}  # of two in different case the first wins
    for conversation in _CONVERSATIONS:
        if conversation in by_name:
            return Fields(conversation=by_name[conversation])
    for prompt, response in _PAIRS:
        if prompt in by_name and response in by_name:
            subjects = _SUBJECTS if prompt == "instruction" else ()  # elsewhere "context" means other things
            subject = next((by_name[name] for name in subjects if name in by_name), "")
            return Fields(prompt=by_name[prompt], subject=subject, response=by_name[response])
    if "text" in by_name:
        return Fields(text=by_name["text"])
    raise DataError(f"no known text columns among {name_columns(present)}; set {_KEYS}")


def to_example(row: Mapping[str, Any], fields: Fields) -> Example:
    """Return what `row` teaches.

    A conversation is cut after its last assistant turn, since nothing is learnt from what follows. A subject
    that is not empty follows the prompt after a blank line.

    Raises:
        RowProblem: a column is missing, null, not text or empty, or a conversation is malformed.
    """
    if fields.conversation:
        return Example(turns=_turns(row, fields.conversation))
    if fields.text:
        return Example(text=_text(row, fields.text))
    prompt = _text(row, fields.prompt)
    if fields.subject and row.get(fields.subject) not in (None, ""):
        subject = row[fields.subject]
        if not isinstance(subject, str):
            raise RowProblem(f"column {fields.subject!r} is not text")
        prompt = f"{prompt}\n\n{subject}" if subject.strip() else prompt
    return Example(turns=(Turn("user", prompt), Turn("assistant", _text(row, fields.response))))


def name_columns(columns: Iterable[str]) -> str:
    """Return `columns` as a list for an error message.

    Only plain single words are named: the "header" of a CSV file without one is its first row of text.
    """
    names = list(columns)
    plain = [name for name in names if _PLAIN_NAME.fullmatch(name)][:_MOST_NAMES]
    others = len(names) - len(plain)
    parts = [*plain, *([f"{others} not shown"] if others else [])]
    return f"the columns ({', '.join(parts)})" if parts else "no columns at all"


def _mapped(present: tuple[str, ...], prompt: str, response: str, text: str) -> Fields:
    if text and (prompt or response):
        raise ConfigError(f"data.text-column = {text!r} contradicts a prompt or response column; set {_KEYS}")
    if not text and not (prompt and response):
        raise ConfigError(f"only one of data.prompt-column and data.response-column is set; set {_KEYS}")
    for key, name in (("prompt", prompt), ("response", response), ("text", text)):
        if name and name not in present:
            raise DataError(f"data.{key}-column = {name!r} is not among {name_columns(present)}")
    return Fields(prompt=prompt, response=response, text=text)


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise RowProblem(f"column {column!r} is missing")
    return row[column]


def _text(row: Mapping[str, Any], column: str) -> str:
    return _filled(_cell(row, column), f"column {column!r}")


def _filled(value: Any, what: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    state = "null" if value is None else "empty" if isinstance(value, str) else "not text"
    raise RowProblem(f"{what} is {state}")


def _turns(row: Mapping[str, Any], column: str) -> tuple[Turn, ...]:
    messages = _cell(row, column)
    if not isinstance(messages, list):
        raise RowProblem(f"column {column!r} is not a list of messages")
    turns = [_turn(message, number) for number, message in enumerate(messages, 1)]
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not any(turn.role == "user" for turn in turns):
        raise RowProblem(f"column {column!r} has no assistant's answer to a user")
    return tuple(turns)


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, dict):
        raise RowProblem(f"message {number} is not an object")
    # OpenAI's form is {"role", "content"}, ShareGPT's {"from", "value"}.
    role = _ROLES.get(str(message.get("role", message.get("from"))).lower())
    if role is None:
        raise RowProblem(f"message {number} has no known role ({', '.join(_ROLES)})")
    return Turn(role, _filled(message.get("content", message.get("value")), f"message {number}"))
