"""Reads one local file into rows, each with the line it starts on.

A reader yields `(line, row)` for a usable row and `(line, reason)` for a bad one. Text formats are decoded
line by line here, not by a library: a library that stops at the first bad byte cannot say which line it is
in, and its message quotes the text. Reasons and errors never hold anything that was read from a row.
"""

import csv
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from fedllm.errors import DataError

Item: TypeAlias = tuple[int, dict[str, Any] | str]
Reader: TypeAlias = Callable[[str], Iterator[Item]]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONE_SURROGATE = "holds a lone surrogate (half of a \\u pair), which is not text"
_JSON_TYPES = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


def read_json_lines(path: str) -> Iterator[Item]:
    """Yield one item for each line that is not blank; every line is one JSON object."""
    for number, line in _numbered_lines(path):
        if line.strip():
            yield number, _object_of_line(line)


def read_paragraphs(path: str) -> Iterator[Item]:
    """Yield `{"text": ...}` for each paragraph; blank lines part paragraphs."""
    runs = itertools.groupby(_numbered_lines(path), key=lambda item: not item[1].strip())
    for is_blank, run in runs:
        if not is_blank:
            yield _paragraph(list(run))


def read_csv(path: str) -> Iterator[Item]:
    """Yield one item for each record below the header line; a record may span lines.

    Raises:
        DataError: the header cannot be read or names a column twice.
    """
    # surrogateescape keeps the records apart when bytes are not UTF-8; `_record` then finds the spoilt cell
    lines = (line.decode("utf-8", "surrogateescape") for _, line in _numbered_lines(path))
    records = csv.reader(lines, strict=True)
    try:
        header = next(records, [])
        while not header and records.line_num:
            header = next(records)
    except (csv.Error, StopIteration):
        raise DataError(f"{path}, line 1: the CSV header cannot be read; write it as name,name,...") from None
    if len(set(header)) < len(header) or _has_surrogate("".join(header)):
        raise DataError(f"{path}, line 1: a CSV header needs UTF-8 column names, each of them once")
    while True:  # a `for` would end at the first bad record
        start = records.line_num + 1
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error:
            yield start, "not a CSV record (a stray or unclosed quote, or a cell above 131072 characters)"
            continue
        if cells:
            yield start, _record(header, cells)


def read_json_document(path: str) -> Iterator[Item]:
    """Yield one item for each element of a JSON list, or of the list under "data"; lines count elements.

    Raises:
        DataError: the document is not UTF-8, not JSON, or not such a list.
    """
    advice = (
        'expected one JSON list of objects or {"data": [...]}; a file of one object a line ends in .jsonl'
    )
    content = Path(path).read_bytes().removeprefix(_BYTE_ORDER_MARK)
    try:
        document = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON; {advice}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: a number is too long or the nesting too deep; {advice}") from None
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise DataError(f"{path}, line 1: holds no list of rows; {advice}")
    for number, row in enumerate(rows, 1):
        yield number, _LONE_SURROGATE if _has_surrogate(row) else _as_object(row)


def read_parquet(path: str) -> Iterator[Item]:
    """Yield one item for each row; lines count rows.

    pyarrow is asked directly, because `datasets` would leave a copy of private text in its cache folder.

    Raises:
        DataError: the file is not parquet or is damaged.
    """
    arrow = importlib.import_module("pyarrow")  # slow to import, and without type information
    parquet = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):  # so that no file need fit in memory at once
                for index in range(batch.num_rows):
                    number += 1
                    yield number, _arrow_row(batch, index)
    except arrow.ArrowException:
        after = f" after row {number}" if number else ""
        raise DataError(f"{path}: not a readable parquet file{after}; write it again") from None


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        ".jsonl": read_json_lines,
        ".json": read_json_document,
        ".csv": read_csv,
        ".parquet": read_parquet,
        ".txt": read_paragraphs,
    }
)


def _numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text at byte {error.start + 1} of the line"


def _object_of_line(line: bytes) -> dict[str, Any] | str:
    try:
        text = line.decode("utf-8")
        value = json.loads(text)
        spoilt = "\\u" in text and _has_surrogate(value)  # only an escape can spell half a pair
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        return f"not valid JSON at character {error.pos + 1} of the line"
    except (ValueError, RecursionError):
        return "not usable JSON (a number too long or nesting too deep)"
    return _LONE_SURROGATE if spoilt else _as_object(value)


def _as_object(value: Any) -> dict[str, Any] | str:
    if isinstance(value, dict):
        return value
    return f"not an object but {_JSON_TYPES.get(type(value), 'null')}"


def _has_surrogate(value: Any) -> bool:
    """Return whether any text in a value cannot be written as UTF-8, and so not be tokenised either."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _paragraph(run: list[tuple[int, bytes]]) -> Item:
    lines: list[str] = []
    for number, line in run:
        try:
            lines.append(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as error:
            return number, _not_utf8(error)
    return run[0][0], {"text": "\n".join(lines)}


def _record(header: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(header):
        return f"{len(cells)} cells where the header has {len(header)}"
    if _has_surrogate(cells):
        return "not UTF-8 text"
    return dict(zip(header, cells, strict=True))


def _arrow_row(batch: Any, index: int) -> dict[str, Any] | str:
    try:
        names = batch.schema.names
        return {name: column[index].as_py() for name, column in zip(names, batch.columns, strict=True)}
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except ValueError:
        return "holds a cell that Python cannot represent"
