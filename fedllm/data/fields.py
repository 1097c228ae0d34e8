"""Turns a row into a training example: which of its columns are the prompt and the answer, or the text.

Columns are recognised by the names that public data sets use, in any case of letters, unless `data.columns`
names them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.config.key import named_values
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
_HINT = "set data.columns to prompt=NAME,response=NAME or text=NAME"
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


def mapped_columns(text: str) -> dict[str, str]:
    """Return what `data.columns` = `text` names: {}, {"prompt": name, "response": name} or {"text": name}.

    Raises:
        ConfigError: it names half a pair, or a pair and a text.
    """
    named = named_values("data.columns", text, ("prompt", "response", "text"))
    if set(named) not in (set(), {"prompt", "response"}, {"text"}):
        raise ConfigError(f"data.columns = {text!r}: one column of text, or a prompt and a response; {_HINT}")
    return named


def detect_fields(columns: Iterable[str], named: Mapping[str, str] | None = None) -> Fields:
    """Return the `named` fields (`mapped_columns`), or else the first usual ones among `columns`.

    Raises:
        DataError: a named column is absent, or nothing is recognised.
    """
    present = tuple(dict.fromkeys(columns))
    if named:
        for name in named.values():
            if name not in present:
                raise DataError(f"data.columns: {name!r} is not among {name_columns(present)}")
        return Fields(**named)
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
    raise DataError(f"no known text columns among {name_columns(present)}; {_HINT}")


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
