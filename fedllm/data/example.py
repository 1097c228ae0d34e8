"""What one row of private text becomes: a conversation, or a plain text."""

from dataclasses import dataclass


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
