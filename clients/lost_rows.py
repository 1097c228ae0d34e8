"""How many of a client's rows nothing is learnt from, why, and what would keep more of them: counts alone."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm.data.fields import Example
from fedllm.data.shards import MOST_LOST
from fedllm.errors import RowsLostError
from fedllm.models.chat import (
    CUT,
    NO_ANSWER,
    REFUSED,
    UNKNOWN_TOKEN,
    Encoded,
    NoRow,
    fate_of_system,
    opens_answer,
)

_NAMED = 8  # clients that have a line of their own
_WHOLE = 0.95  # share of the rows for which a longer limit is worked out
_BAD = "bad"
_LOST = {
    _BAD: "are bad",
    CUT: "lose their whole answer at train.max-length = {limit}",
    REFUSED: "are refused by the model's chat template (some want user and assistant in turn)",
    NO_ANSWER: "have no answer left in the model's chat template",
    UNKNOWN_TOKEN: "hold a token that the model has no embedding for",
}
_NOTES = {
    "truncated": "are truncated",
    "refused system": "have the system's words in the user's turn, as the chat template refuses a system's",
    "no system": "lose their system turn, which the model's chat template leaves out",
    "thought": "are learnt without the thinking tag that ends the chat template's generation prompt",
}


@dataclass(frozen=True)
class RowCounts:
    """What became of `number` rows: how many are of each of the kinds above, and the lengths of the rows.

    A length is in tokens and that of the whole row, however much of it is kept.
    """

    number: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    lengths: tuple[int, ...] = ()

    @property
    def num_lost(self) -> int:
        """Rows nothing is learnt from."""
        return sum(self.kinds[cause] for cause in _LOST)

    @property
    def are_too_many_lost(self) -> bool:
        """Whether a client loses so many rows that it does not take part."""
        return self.num_lost > MOST_LOST * self.number

    def __add__(self, other: "RowCounts") -> "RowCounts":
        """Return the counts of two clients as one."""
        return RowCounts(self.number + other.number, self.kinds + other.kinds, self.lengths + other.lengths)


def count_rows(
    examples: Sequence[Example], rows: Sequence[Encoded | NoRow], tokenizer: Any, num_bad: int = 0
) -> RowCounts:
    """Return what became of `examples`, which were encoded as `rows`, and of bad rows besides."""
    kept = [example for example, row in zip(examples, rows, strict=True) if isinstance(row, Encoded)]
    num_systems = sum(any(turn.role == "system" for turn in example.turns) for example in kept)
    num_chats = sum(bool(example.turns) for example in kept)
    kinds = Counter(row.cause for row in rows if isinstance(row, NoRow))
    kinds[_BAD] = num_bad
    kinds["truncated"] = sum(row.num_cut > 0 for row in rows if isinstance(row, Encoded))
    if num_systems:
        fate = fate_of_system(tokenizer)
        kinds["refused system"] = num_systems * (fate == "refused")
        kinds["no system"] = num_systems * (fate == "left out")
    if num_chats and opens_answer(tokenizer):
        kinds["thought"] = num_chats
    whole = (len(row.tokens) + row.num_cut if isinstance(row, Encoded) else row.length for row in rows)
    return RowCounts(len(rows) + num_bad, +kinds, tuple(length for length in whole if length))


def describe(counts: RowCounts, limit: int) -> str:
    """Return in words what became of rows at a limit of `limit` tokens, "" where all is well.

    Bad rows alone have been told of with their reasons where they were read.
    """
    if not counts.kinds.keys() - {_BAD}:
        return ""
    told = [
        f"{counts.kinds[kind]} rows {words}" for kind, words in (_LOST | _NOTES).items() if counts.kinds[kind]
    ]
    if counts.kinds[CUT]:
        longer = sorted(counts.lengths)[math.ceil(_WHOLE * len(counts.lengths)) - 1]
        whole = sum(length <= longer for length in counts.lengths)
        told.append(f"train.max-length = {longer} would keep {whole} of {counts.number} whole")
    skipped = f"{counts.num_lost} of {counts.number} rows are skipped: " if counts.num_lost else ""
    return skipped + "; ".join(told).format(limit=limit)


def describe_left_out(clients: Mapping[str, RowCounts], limit: int) -> str:
    """Return in words which clients lose more rows than they may, "" where none does."""
    bad = {client: counts for client, counts in clients.items() if counts.are_too_many_lost}
    told = [f"client {client}: {describe(counts, limit)}" for client, counts in list(bad.items())[:_NAMED]]
    more = [f"and {len(bad) - _NAMED} more clients"] if len(bad) > _NAMED else []
    return f"more than {MOST_LOST:.0%} of the rows are lost; {' | '.join([*told, *more])}" if bad else ""


def check_none_left_out(clients: Mapping[str, RowCounts], limit: int) -> None:
    """Refuse rows of which some client loses more than it may.

    Raises:
        RowsLostError: one does; the message names it and the limit that would keep more.
    """
    if told := describe_left_out(clients, limit):
        raise RowsLostError(told)
