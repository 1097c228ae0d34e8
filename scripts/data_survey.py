"""What rows look like before a run: their columns, scripts, lengths in tokens, and who may own them.

It counts and never quotes: what it returns holds names of columns and numbers alone.
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.data.fields import Example, Fields, RowProblem, detect_fields, mapped_columns, to_example
from fedllm.data.partition import row_label
from fedllm.data.rows import Rows
from fedllm.errors import ConfigError, DataError
from fedllm.models.chat import IGNORED, Encoded, encode_or_cause

LIMITS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # of train.max-length
_MOST_SAMPLED = 2000  # rows whose text is read: enough for shares within two points
_WHOLE = 10**7  # tokens that no row reaches, so that none is cut
_FEWEST_ROWS = 4  # of a client on average, where a column is to name clients
# Columns that name an owner, likeliest first
_OWNERS = (
    *("client", "user", "author", "speaker", "patient", "hospital", "institute", "institution", "site"),
    *("office", "organisation", "organization", "company", "source", "domain", "topic", "category"),
)
_SCRIPTS = {
    "HANGUL": "Korean",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "CJK": "Chinese characters",
    "LATIN": "Latin letters",
}


@dataclass(frozen=True)
class Column:
    """A column: how many rows have it, its mean characters, and the rows of each of its values.

    `sizes` is in descending order, and empty where the column holds lists or objects.
    """

    name: str
    filled: int
    characters: float
    sizes: tuple[int, ...]

    @property
    def can_own(self) -> bool:
        """Whether its values may be the clients: at least two, with several rows each."""
        return len(self.sizes) > 1 and sum(self.sizes) >= _FEWEST_ROWS * len(self.sizes)


@dataclass(frozen=True)
class Lengths:
    """Tokens of sampled rows: of a whole row, and up to the first token of its answer."""

    whole: tuple[int, ...]
    before_answer: tuple[int, ...]
    characters: int

    def cut(self, limit: int) -> float:
        """Return the share of rows longer than `limit` tokens."""
        return sum(length > limit for length in self.whole) / len(self.whole)

    def lost(self, limit: int) -> float:
        """Return the share of rows that lose their whole answer at `limit` tokens."""
        return sum(length >= limit for length in self.before_answer) / len(self.whole)


@dataclass(frozen=True)
class Survey:
    """What was found; `columns_key` is a value of data.columns where the usual names are not there."""

    columns: tuple[Column, ...]
    fields: Fields
    columns_key: str
    owners: tuple[Column, ...]  # that may be the clients, likeliest first
    scripts: Mapping[str, float]  # share of all letters
    lengths: Lengths
    num_rows: int  # of use


def survey(rows: Rows, tokenizer: Any, owner: str = "") -> Survey:
    """Return what rows look like; `owner` is the column of the clients where the person named one.

    Raises:
        ConfigError: no row has a value in the column `owner`.
        DataError: no column of text is found, or no row is of use.
    """
    columns = tuple(_columns(rows.rows))
    named = ""
    try:
        fields = detect_fields(column.name for column in columns if column.filled)
    except DataError:
        named = guessed_columns(columns)
        fields = detect_fields((column.name for column in columns), mapped_columns(named))
    step = -(-len(rows.rows) // _MOST_SAMPLED) or 1
    examples = _examples(rows.rows[::step], fields)
    if not examples:
        raise DataError("none of the rows has text in its columns; name them by their fields (docs/data.md)")
    read = {fields.prompt, fields.response, fields.text, fields.subject, fields.conversation, fields.system}
    owners = [column for column in columns if column.can_own and column.name not in read]
    if owner:
        owners = [column for column in columns if column.name == owner and column.sizes]
        if not owners:
            raise ConfigError(f"--clients {owner}: no row has a value in a column of this name")
    texts = [text for example in examples for text in _texts(example)]
    return Survey(
        columns=columns,
        fields=fields,
        columns_key=named,
        owners=tuple(sorted(owners, key=_owner_rank)),
        scripts=script_shares(texts),
        lengths=_lengths(examples, tokenizer, sum(map(len, texts))),
        num_rows=round(len(rows.rows) * len(examples) / len(rows.rows[::step])),
    )


def guessed_columns(columns: Sequence[Column]) -> str:
    """Return a value of data.columns for rows without usual names: the two longest columns of text, or one.

    Raises:
        DataError: no column holds text of several words.
    """
    texts = sorted((column for column in columns if column.characters >= 3), key=lambda c: -c.characters)[:2]
    if not texts:
        raise DataError("no column of text among them; name one text, or two prompt and response")
    if len(texts) == 1:
        return f"text={texts[0].name}"
    first, second = (column for column in columns if column in texts)  # a question comes before its answer
    return f"prompt={first.name},response={second.name}"


def script_shares(texts: Sequence[str]) -> dict[str, float]:
    """Return the share of letters in each script, the largest first: a light hint at languages."""
    letters: Counter[str] = Counter()
    for text in texts:
        letters.update(text)
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        if letter.isalpha():
            script = unicodedata.name(letter, "OTHER").split()[0]
            scripts[_SCRIPTS.get(script, script.capitalize())] += count
    return {script: count / scripts.total() for script, count in scripts.most_common()}


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if row.get(name) not in (None, "", [])]
        texts = [value for value in values if isinstance(value, str)]
        sizes = Counter(row_label(row, name) for row in rows)
        del sizes[None]
        mean = sum(map(len, texts)) / max(1, len(texts))
        columns.append(Column(name, len(values), mean, tuple(sorted(sizes.values(), reverse=True))))
    return columns


def _owner_rank(column: Column) -> tuple[int, int]:
    name = column.name.lower()
    known = next((place for place, each in enumerate(_OWNERS) if each in name), len(_OWNERS))
    return known, -len(column.sizes)


def _examples(rows: Sequence[Mapping[str, Any]], fields: Fields) -> list[Example]:
    examples = []
    for row in rows:
        try:
            examples.append(to_example(row, fields))
        except RowProblem:
            continue  # `fedllm check` counts them with their reasons
    return examples


def _texts(example: Example) -> list[str]:
    return [example.text] if example.text else [turn.content for turn in example.turns]


def _lengths(examples: Sequence[Example], tokenizer: Any, characters: int) -> Lengths:
    whole, before = [], []
    for example in examples:
        row = encode_or_cause(example, tokenizer, _WHOLE)
        if isinstance(row, Encoded):
            whole.append(len(row.tokens))
            learnt = (place for place, label in enumerate(row.labels) if place and label != IGNORED)
            before.append(next(learnt))
    if not whole:
        raise DataError("the model's chat template takes none of the rows; choose another --model")
    return Lengths(tuple(whole), tuple(before), characters)
