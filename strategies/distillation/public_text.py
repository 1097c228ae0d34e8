"""Public text at the server: read as private text is, parted by document, no copy of what is held out.

What stands in `distill.text` is read when a run starts, so that a file that cannot be read ends the run
before its first round and not after its last.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from fedllm.config.keys import DataConfig
from fedllm.data.fields import Fields, RowProblem, detect_fields, mapped_columns, to_example
from fedllm.data.partition import parse_partition, row_label
from fedllm.data.public_text import PublicText
from fedllm.data.rows import Rows, read_rows
from fedllm.errors import DataError, NoDataError
from fedllm.originality.duplicates import contaminated
from fedllm.plan.distillation import HELD_OUT_SHARE, DistillationPlan, num_held_out
from fedllm.seeds import derive_seed


@dataclass(frozen=True)
class Split:
    """Public texts to distil on and, of other documents, texts to measure on."""

    train: tuple[PublicText, ...]
    held_out: tuple[PublicText, ...]
    num_removed: int  # near copies of held-out texts, which are not distilled on


def open_public_text(plan: DistillationPlan | None, data: DataConfig) -> tuple[PublicText, ...]:
    """Return the public text that a run's steps use, none where they use none.

    Raises:
        DataError: it cannot be read or is too little.
    """
    if plan is None or not plan.public_source:
        return ()
    return read_public(plan.public_source, data)


def read_public(source: str, data: DataConfig) -> tuple[PublicText, ...]:
    """Return the public texts of `source`, which takes what `data.source` takes.

    A document is a file of plain text; where there is only one, and in other formats, it is a row. A domain
    is the value of the column that parts the clients' rows, else the file.

    Raises:
        DataError: nothing is there, it cannot be read, or it is one text alone.
        NoDataError: no row can be used.
    """
    try:
        rows = read_rows(source, split=data.split, on_bad_row=data.on_bad_row)
        texts = tuple(_texts(rows, data)) if rows.rows else ()
    except DataError as error:
        raise DataError(f"distill.text: {error}") from None
    if not texts:
        raise NoDataError(f"distill.text: {source}: no row can be used; name a source with text")
    if len({text.document for text in texts}) == 1:
        raise DataError(f"distill.text: {source}: holds one document, and one is held out; name more")
    return texts


def _texts(rows: Rows, data: DataConfig) -> Iterator[PublicText]:
    fields = _fields(list(dict.fromkeys(name for row in rows.rows for name in row)), data)
    column = parse_partition(data.partition).column
    several = len({file for file, _ in rows.origins}) > 1
    for row, (file, line) in zip(rows.rows, rows.origins, strict=True):
        try:
            example = to_example(row, fields)
        except RowProblem:  # as in private text, where a bad row costs only itself
            continue
        label = row_label(row, column) if column else None
        is_plain = several and Path(file).suffix.lower() == ".txt"
        yield PublicText(example, file if is_plain else f"{file}:{line}", label or Path(file).stem)


def _fields(columns: Sequence[str], data: DataConfig) -> Fields:
    """Return the columns by the names the private text has, where public text has them too, else detected."""
    named = mapped_columns(data.columns)
    return detect_fields(columns, named if set(named.values()) <= set(columns) else {})


def split_texts(
    texts: Sequence[PublicText], num_texts: int, seed: int, tokens_of: Callable[[str], Sequence[int]]
) -> Split:
    """Return `num_texts` texts at most, a quarter as many held out, of all domains alike.

    No document is in both parts, and no text nearly repeats a held-out one (`fedllm.originality.duplicates`,
    over the tokens that `tokens_of` makes of it). A domain with a single document gives it to the first part,
    unless every domain has only one.

    Raises:
        NoDataError: every text nearly repeats a held-out one.
    """
    number = num_held_out(num_texts)
    by_domain: dict[str, dict[str, list[PublicText]]] = {}
    for text in texts:
        by_domain.setdefault(text.domain, {}).setdefault(text.document, []).append(text)
    if all(len(documents) == 1 for documents in by_domain.values()):
        merged = {name: rows for documents in by_domain.values() for name, rows in documents.items()}
        by_domain = {"": merged}
    held_out, train = [], []
    for domain, documents in sorted(by_domain.items()):
        order = np.random.Generator(np.random.PCG64(derive_seed(seed, "documents", domain))).permutation(
            len(documents)
        )
        names = [sorted(documents)[index] for index in order]
        # A fifth of the documents, so that texts held out are a quarter of those distilled on.
        count = min(len(names) - 1, max(1, round(len(names) * HELD_OUT_SHARE / (1 + HELD_OUT_SHARE))))
        held_out.append([text for name in names[:count] for text in documents[name]])
        train.append([text for name in names[count:] for text in documents[name]])
    kept = _interleave(held_out)[:number]
    wanted = _interleave(train)
    tokens, held_out_tokens = ([tokens_of(plain_words(text)) for text in part] for part in (wanted, kept))
    copies = contaminated(tokens, held_out_tokens)
    # Near copies would show what the student has memorised, not what it has learnt.
    clean = [text for text, is_copy in zip(wanted, copies, strict=True) if not is_copy]
    if not clean:
        raise NoDataError("distill.text: every text is nearly a copy of one that is held out; name more text")
    return Split(tuple(clean[:num_texts]), tuple(kept), len(wanted) - len(clean))


def _interleave(groups: Sequence[Sequence[PublicText]]) -> list[PublicText]:
    """Return one text of every group, then the second of each, and so on."""
    return [text for text in chain.from_iterable(zip_longest(*groups)) if text is not None]


def plain_words(text: PublicText) -> str:
    """Return what a text says, without the marks of a chat template, which all have in common."""
    return text.example.text or "\n".join(turn.content for turn in text.example.turns)
