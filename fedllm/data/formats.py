"""Reads one local file into rows, each with the line it starts on.

A reader yields `(line, row)` for a usable row and `(line, reason)` for a bad one. Text formats are decoded
line by line here, not by a library: a library that stops at the first bad byte cannot say which line it is
in, and its message quotes the text. Reasons and errors never hold anything that was read from a row.
"""

import csv
import importlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from fedllm.errors import DataError

Item: TypeAlias = tuple[int, dict[str, Any] | str]
Reader: TypeAlias = Callable[[str], Iterator[Item]]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONE_SURROGATE = "holds a lone surrogate (half of a \\u pair), which is not text"
_NUL = "holds a NUL character, which is not text"
_NO_RECORD = "not a CSV record (a stray or unclosed quote, or a cell above 131072 characters)"
_JSON_TYPES = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
_OTHER_LISTS = ("train", "rows", "test", "examples", "items", "records")  # known names, so not private
_BETWEEN_VALUES = re.compile(r"[\s,]*")
_DELIMITERS = ",;\t|"
_TRIED = 50  # records of a CSV file whose header leaves open what parts the cells
_QUOTED = re.compile(r'"[^"]*"')
_EXCEL_LINE = re.compile(r"sep=(.)", re.IGNORECASE)  # a first line that tells Excel the delimiter
_REPEATED = object()  # in place of a JSON object that names a key twice
# The first bytes of what is no text and no table under whatever name, and what to do about it
_OTHER_CONTENT = {
    b"\xff\xfe": "UTF-16 text; save the file as UTF-8",
    b"\xfe\xff": "UTF-16 text; save the file as UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save the sheet as .csv",
    b"version https://git-lfs": "a Git LFS pointer and not the file itself; fetch it with git lfs pull",
}


def check_content(path: str) -> None:
    """Refuse a file whose first bytes say that it is something else than its name says.

    Raises:
        OSError: the file cannot be read.
        DataError: it is compressed, UTF-16 text or a pointer to another file.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    for mark, what in _OTHER_CONTENT.items():
        if head.startswith(mark):
            raise DataError(f"{path}: {what}")
    if b"\0" in head and not head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        raise DataError(f"{path}: holds NUL bytes, as UTF-16 text does; save the file as UTF-8 text")


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> Any:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _REPEATED


# NaN and Infinity are no JSON, and pandas writes them for what is absent.
_JSON = json.JSONDecoder(object_pairs_hook=_object_of_pairs, parse_constant=lambda _: None)


def read_json_lines(path: str) -> Iterator[Item]:
    """Yield one item for each line that is not blank; every line is one JSON object.

    A file whose first line is no whole object is read for what it is where that is plain: a JSON list, or
    objects that span lines or share one.

    Raises:
        DataError: it is such a file, and not JSON to its end.
    """
    first = next((line for _, line in _numbered_lines(path) if line.strip()), b"{}")
    if isinstance(_object_of_line(first), str) and (values := _values(path)):
        yield from values
        return
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

    The header tells whether commas, semicolons, tabs or bars part the cells. Columns without a name, as the
    index that pandas writes, are left out.

    Raises:
        DataError: the header cannot be read or names a column twice.
    """
    taken: list[str] = []  # the lines of the record that is being read

    def lines() -> Iterator[str]:
        for _, line in _numbered_lines(path):
            # keeps records apart where bytes are not UTF-8; `_record` finds the spoilt cell
            taken.append(line.decode("utf-8", "surrogateescape"))
            yield taken[-1]

    form: dict[str, Any] = {"delimiter": _delimiter(path), "strict": True, "skipinitialspace": True}
    records = csv.reader(lines(), **form)
    header = _header(path, records)
    while True:  # a `for` would end at the first bad record
        start = records.line_num + 1
        taken.clear()
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error:
            made: dict[str, Any] | str = _NO_RECORD
        else:
            if not any(map(str.strip, cells)):
                continue
            made = _record(header, cells)
        if isinstance(made, dict) or len(taken) == 1:
            yield start, made
            continue
        # An open quote has made one record of several: each is lost, and is to be counted.
        yield start, f"{made}; it takes in lines {start} to {records.line_num}"
        for number, line in enumerate(taken[1:], start + 1):
            if _is_record(line, len(header), form):
                yield number, f"inside the quote that line {start} leaves open"


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
        document = _JSON.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON; {advice}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: a number is too long or the nesting too deep; {advice}") from None
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        under = [name for name in _OTHER_LISTS if isinstance(document, dict) and name in document]
        where = f' but something under "{under[0]}"' if under else ""
        raise DataError(f"{path}, line 1: holds no list of rows{where}; {advice}")
    for number, row in enumerate(rows, 1):
        yield number, _as_object(row)


def read_parquet(path: str) -> Iterator[Item]:
    """Yield one item for each row; lines count rows.

    pyarrow is asked directly, because `datasets` would leave a copy of private text in its cache folder.

    Raises:
        DataError: the file is not parquet or is damaged.
    """
    parquet = importlib.import_module("pyarrow.parquet")  # slow to import, and without type information

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1024)  # so that no file need fit in memory at once

    return _arrow_rows(path, "parquet", batches())


def read_arrow(path: str) -> Iterator[Item]:
    """Yield one item for each row of an Arrow file, as `Dataset.save_to_disk` writes; lines count rows.

    Raises:
        DataError: the file is not Arrow or is damaged.
    """
    ipc = importlib.import_module("pyarrow.ipc")

    def batches() -> Iterator[Any]:
        with open(path, "rb") as file:
            is_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            if is_stream:
                yield from ipc.open_stream(file)
            else:
                reader = ipc.open_file(file)
                yield from map(reader.get_batch, range(reader.num_record_batches))

    return _arrow_rows(path, "Arrow", batches())


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        ".jsonl": read_json_lines,
        ".json": read_json_document,
        ".csv": read_csv,
        ".tsv": read_csv,
        ".parquet": read_parquet,
        ".arrow": read_arrow,
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
        # only an escape can spell half a pair
        return _as_object(_JSON.decode(text), may_be_half="\\u" in text)
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        return f"not valid JSON at character {error.pos + 1} of the line"
    except (ValueError, RecursionError):
        return "not usable JSON (a number too long or nesting too deep)"


def _values(path: str) -> list[Item]:
    """Return the objects of a file of JSON values one after another, none where it does not begin as one."""
    try:
        text = Path(path).read_bytes().removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError:
        return []
    values: list[tuple[int, Any]] = []
    line, place, after = 1, 0, 0
    while True:
        between = _BETWEEN_VALUES.match(text, after)
        assert between is not None  # it may match nothing
        line, place = line + text.count("\n", place, between.end()), between.end()
        if place == len(text):
            break
        try:
            value, after = _JSON.raw_decode(text, place)
        except (ValueError, RecursionError):
            if not values or line == values[0][0]:  # one bad line at the top of a file of lines
                return []
            why = "not valid JSON, in a file whose values are not one on a line"
            raise DataError(f"{path}, line {line}: {why}; write one object on a line") from None
        values.append((line, value))
    if len(values) == 1 and isinstance(values[0][1], list):
        values = list(enumerate(values[0][1], 1))  # lines count elements, as in a .json file
    elif all(isinstance(value, list) for _, value in values):
        return []  # a list on each line: every line is a bad row of its own
    return [(number, _as_object(value)) for number, value in values]


def _as_object(value: Any, *, may_be_half: bool = True) -> dict[str, Any] | str:
    if isinstance(value, dict):
        return _LONE_SURROGATE if may_be_half and _has_surrogate(value) else value
    if value is _REPEATED:
        return "names a key twice"
    return f"not an object but {_JSON_TYPES.get(type(value), 'null')}"


def _has_surrogate(value: Any) -> bool:
    """Return whether any text in a value cannot be written as UTF-8, and so not be tokenised either."""
    try:
        json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8")
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
    text = "\n".join(lines)
    return run[0][0], _NUL if "\0" in text else {"text": text}


def _delimiter(path: str) -> str:
    """Return what parts the cells of a CSV file.

    Of what its header has outside quotes it is that by which most of the first records have as many cells as
    the header, so that a comma's file may have bars within its names; else what the header has most of.
    """
    first = next((line for _, line in _numbered_lines(path) if line.strip()), b"")
    text = first.decode("utf-8", "surrogateescape").strip("\r\n")
    if named := _EXCEL_LINE.fullmatch(text):
        return named[1]
    bare = _QUOTED.sub("", text)
    if path.lower().endswith(".tsv") and "\t" in bare:
        return "\t"
    present = [character for character in _DELIMITERS if character in bare] or [","]
    if len(present) == 1:
        return present[0]
    return max(present, key=lambda character: (_num_fitting(path, character), bare.count(character)))


def _num_fitting(path: str, delimiter: str) -> int:
    """Return how many of a file's first records have as many cells as its header."""
    lines = (line.decode("utf-8", "surrogateescape") for _, line in _numbered_lines(path) if line.strip())
    try:
        records = list(
            itertools.islice(csv.reader(lines, delimiter=delimiter, skipinitialspace=True), _TRIED)
        )
    except csv.Error:
        return 0
    return sum(len(record) == len(records[0]) for record in records[1:])


def _header(path: str, records: Any) -> list[str]:
    header: list[str] = []
    try:
        while not header or _EXCEL_LINE.fullmatch("".join(header) + records.dialect.delimiter):
            header = [name.strip() for name in next(records)]
    except StopIteration:
        if not records.line_num:
            return []  # an empty file has no rows
    except csv.Error:
        header = []
    if not any(header):
        raise DataError(f"{path}, line 1: the CSV header cannot be read; write it as name,name,...") from None
    named = [name for name in header if name]
    if len(set(named)) < len(named) or _has_surrogate(named):
        raise DataError(f"{path}, line 1: a CSV header needs UTF-8 column names, each of them once")
    return header


def _record(header: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(header):
        return f"{len(cells)} cells where the header has {len(header)}"
    if _has_surrogate(cells):
        return "not UTF-8 text"
    if any("\0" in cell for cell in cells):
        return _NUL
    return {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _is_record(line: str, num_cells: int, form: Mapping[str, Any]) -> bool:
    try:
        return [len(cells) for cells in csv.reader([line], **form)] == [num_cells]
    except csv.Error:
        return False


def _arrow_rows(path: str, kind: str, batches: Iterator[Any]) -> Iterator[Item]:
    arrow = importlib.import_module("pyarrow")
    number = 0
    try:
        for batch in batches:
            if len(set(batch.schema.names)) < batch.num_columns:
                raise DataError(f"{path}: has two columns of one name; rename one")
            for index in range(batch.num_rows):
                number += 1
                yield number, _arrow_row(batch, index)
    except (arrow.ArrowException, EOFError):
        after = f" after row {number}" if number else ""
        raise DataError(f"{path}: not a readable {kind} file{after}; write it again") from None


def _arrow_row(batch: Any, index: int) -> dict[str, Any] | str:
    try:
        names = batch.schema.names
        return {name: column[index].as_py() for name, column in zip(names, batch.columns, strict=True)}
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except ValueError:
        return "holds a cell that Python cannot represent"
