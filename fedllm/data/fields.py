"""Turns a row into a training example: which of its columns are the prompt and the answer, or the text.

Columns are recognised by the names that public data sets use, in any case of letters, unless `data.columns`
names them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
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
_SYSTEMS = ("system", "system_prompt")
_PREFERENCES = ("chosen", "rejected")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")
_TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "file")
_HINT = "set data.columns to prompt=NAME,response=NAME or text=NAME"
_PLAIN_NAME = re.compile(r"[^\W\d][\w.-]{0,39}")
_MOST_NAMES = 20
_MOST_REASONS = 5


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is "system", "user" or "assistant".

    An answer that is not `learnt` is read as part of the prompt.
    """

    role: str
    content: str
    learnt: bool = True


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
    """The rows of one data holder, split by the run's seed or by the holder's own secret.

    `num_public` is the number of training rows that it declares where what rows say must not show in it: all
    that stand there, of use or not.
    """

    client_id: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    num_bad: int = 0  # in a file of its own; of a dealt source nobody knows whose they are
    num_public: int | None = None


@dataclass(frozen=True)
class Fields:
    """The columns of a row: `conversation`, or `prompt` (and `subject`) and `response`, or `text`."""

    system: str = ""  # optional text that comes before a conversation or a prompt
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
    system = next((by_name[name] for name in _SYSTEMS if name in by_name), "")
    for conversation in _CONVERSATIONS:
        if conversation in by_name:
            return Fields(system=system, conversation=by_name[conversation])
    for prompt, response in _PAIRS:
        if prompt in by_name and response in by_name:
            subjects = _SUBJECTS if prompt == "instruction" else ()  # elsewhere "context" means other things
            subject = next((by_name[name] for name in subjects if name in by_name), "")
            return Fields(system=system, prompt=by_name[prompt], subject=subject, response=by_name[response])
    if "text" in by_name:
        return Fields(text=by_name["text"])
    if by_name.keys() >= {*_PREFERENCES}:
        raise DataError(
            f"preferences (chosen, rejected) among {name_columns(present)}: only answers are learnt from;"
            " set data.columns to prompt=NAME,response=chosen, or rename chosen to messages"
        )
    raise DataError(f"no known text columns among {name_columns(present)}; {_HINT}")


def to_example(row: Mapping[str, Any], fields: Fields) -> Example:
    """Return what `row` teaches.

    A conversation is cut after its last assistant turn, since nothing is learnt from what follows. A subject
    that is not empty follows the prompt after a blank line. Prompt and response may be lists of messages, as
    in TRL; answers within the prompt are not learnt. A system column counts where the conversation has no
    system turn of its own.

    Raises:
        RowProblem: a column is missing, null, not text or empty, or a conversation is malformed.
    """
    if fields.text:
        return Example(text=_text(row, fields.text))
    turns = _conversation(row, fields.conversation) if fields.conversation else _pair(row, fields)
    system = row.get(fields.system) if fields.system else None
    if not _is_empty(system) and turns[0].role != "system":
        turns = (Turn("system", _content(system, f"column {fields.system!r}")), *turns)
    return Example(turns=turns)


def count_reasons(bad: Sequence[BadRow]) -> str:
    """Return why rows cannot be used, each reason with its number of rows and where it was met first."""
    kinds = [re.sub(r"^message \d+", "a message", row.reason) for row in bad]
    first = dict(zip(reversed(kinds), reversed(bad), strict=True))
    counts = Counter(kinds).most_common()
    told = [
        f"{number} x {kind} (first: {first[kind].file}, line {first[kind].line})"
        for kind, number in counts[:_MOST_REASONS]
    ]
    others = sum(number for _, number in counts[_MOST_REASONS:])
    return "; ".join([*told, *([f"{others} for other reasons"] if others else [])])


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
    """Return a value as text that is not empty; a number, such as a label, becomes its digits."""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, int | float | Decimal):
        value = None if value != value else str(value)  # a missing number is stored as NaN
    if isinstance(value, str) and value.strip():
        return value
    state = "null" if value is None else "empty" if isinstance(value, str) else "not text"
    raise RowProblem(f"{what} is {state}")


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _pair(row: Mapping[str, Any], fields: Fields) -> tuple[Turn, ...]:
    prompt, response = _cell(row, fields.prompt), _cell(row, fields.response)
    if isinstance(prompt, list):
        said = _messages(prompt)
        asked = tuple(turn if turn.role != "assistant" else _unlearnt(turn) for turn in said)
    else:
        asked = (Turn("user", _with_subject(_text(row, fields.prompt), row, fields.subject)),)
    if not isinstance(response, list):
        return *asked, Turn("assistant", _text(row, fields.response))
    answered = _answered(response, fields.response, asked)
    # Some completions hold the whole conversation, with the prompt as its beginning.
    repeats = [turn.content for turn in answered[: len(asked)]] == [turn.content for turn in asked]
    return *asked, *(answered[len(asked) :] if repeats else answered)


def _with_subject(prompt: str, row: Mapping[str, Any], column: str) -> str:
    subject = row.get(column) if column else None
    if subject is not None and not isinstance(subject, str):
        raise RowProblem(f"column {column!r} is not text")
    return f"{prompt}\n\n{subject}" if subject and subject.strip() else prompt


def _conversation(row: Mapping[str, Any], column: str) -> tuple[Turn, ...]:
    messages = _cell(row, column)
    if not isinstance(messages, list):
        raise RowProblem(f"column {column!r} is not a list of messages")
    return _answered(messages, column)


def _answered(messages: Sequence[Any], column: str, before: Sequence[Turn] = ()) -> tuple[Turn, ...]:
    """Return messages as turns, up to the last answer to a user; the turns `before` precede them."""
    turns = _messages(messages, to_last_answer=True)
    while turns and not (turns[-1].role == "assistant" and turns[-1].learnt):
        turns.pop()
    if not turns or not any(turn.role == "user" for turn in (*before, *turns)):
        raise RowProblem(f"column {column!r} has no assistant's answer to a user")
    return tuple(turns)


def _messages(messages: Sequence[Any], *, to_last_answer: bool = False) -> list[Turn]:
    """Return messages as turns, without empty system turns."""
    roles = [_role(message, number) for number, message in enumerate(messages, 1)]
    while to_last_answer and roles and roles[-1] != "assistant":
        roles.pop()  # nothing is learnt from what follows, so it may even be empty
    turns = (_turn(role, messages[place], place + 1) for place, role in enumerate(roles))
    return [turn for turn in turns if turn is not None]


def _role(message: Any, number: int) -> str:
    if not isinstance(message, dict):
        raise RowProblem(f"message {number} is not an object")
    name = str(_first(message, "role", "from")).strip().lower()
    if name in _TOOL_ROLES:  # named, as it is one of a few known words; any other may be private text
        raise RowProblem(
            f"message {number} has no known role: {name!r} is a tool's, and no tool is learnt from"
        )
    if message.get("tool_calls") or message.get("function_call"):
        raise RowProblem(f"message {number} calls a tool (tool_calls), and no tool is learnt from")
    if name not in _ROLES:
        raise RowProblem(f"message {number} has no known role ({', '.join(_ROLES)})")
    return _ROLES[name]


def _turn(role: str, message: Mapping[str, Any], number: int) -> Turn | None:
    content = _first(message, "content", "value")
    if role == "system" and _is_empty(content):
        return None
    # OpenAI's fine-tuning files give answers that are not to be learnt the weight 0.
    return Turn(role, _content(content, f"message {number}"), message.get("weight") != 0)


def _first(message: Mapping[str, Any], *names: str) -> Any:
    """Return the value of the first name that has one.

    OpenAI's form is {"role", "content"}, ShareGPT's {"from", "value"}; a Parquet file of both has all four
    names in every message, two of them null.
    """
    values = [message[name] for name in names if message.get(name) is not None]
    return next((value for value in values if not _is_empty(value)), values[0] if values else None)


def _content(value: Any, what: str) -> str:
    """Return what a message says; a list of parts of text is joined as chat templates join it."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return _filled(value, what)
    for part in value:
        kind = part.get("type") or "text"
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            name = f"of kind {kind!r}" if kind in _OTHER_PARTS else "without text"
            raise RowProblem(f"{what} has a part {name} in its list of parts, and only text is learnt from")
    return _filled("".join(part["text"] for part in value), what)


def _unlearnt(turn: Turn) -> Turn:
    return Turn(turn.role, turn.content, learnt=False)
