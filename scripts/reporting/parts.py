"""What a page is made of: findings, tiles, sections with a chart and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import rich.table

from scripts.reporting.figures import Figure


@dataclass(frozen=True)
class Table:
    """A table below its caption; a long one is folded away until somebody opens it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_open: bool = True
    has_texts: bool = False  # whether its cells are texts, whose line breaks count


@dataclass(frozen=True)
class Section:
    """A heading that says what was found, sentences, a chart, tables."""

    title: str
    text: Sequence[str] = ()
    figure: Figure | None = None
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """All of a page; the first finding stands in large letters."""

    title: str
    findings: Sequence[str]
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    footer: str


def from_terminal(table: rich.table.Table, caption: str) -> Table:
    """Return a table that a command prints."""
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    return Table(caption, [str(column.header) for column in table.columns], list(zip(*cells, strict=True)))


def number(value: float | None, digits: int = 3) -> str:
    """Return a number as text; "" for none."""
    return "" if value is None else f"{value:,.{digits}f}"


def megabytes(number_of_bytes: float) -> str:
    """Return bytes in MB."""
    return f"{number_of_bytes / 1e6:,.3g} MB" if number_of_bytes < 1e9 else f"{number_of_bytes / 1e9:,.3g} GB"
