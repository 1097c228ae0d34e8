import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.data.rows import Rows, read_rows
from tests.data.builders import SECRET, line, write

BAD_LINES = {
    "malformed": (f'{{"text": "{SECRET}", }}'.encode(), "not valid JSON at character"),
    "cut short": (f'{{"text": "{SECRET}'.encode(), "not valid JSON at character"),
    "not UTF-8": (f'{{"text": "{SECRET} \xe9"}}'.encode("latin-1"), "not UTF-8 text at byte 25"),
    "lone surrogate": (f'{{"text": "{SECRET} \\ud83d"}}'.encode(), "lone surrogate"),
    "lone surrogate deep": (f'{{"text": [{{"{SECRET}": "\\udc00"}}]}}'.encode(), "lone surrogate"),
    "a text": (f'"{SECRET}"'.encode(), "not an object but a text"),
    "a list": (f'["{SECRET}"]'.encode(), "not an object but a list"),
    "null": (b"null", "not an object but null"),
    "too deep": (b"[" * 100_000, "nesting too deep"),
    "long number": (b'{"text": ' + b"1" * 5000 + b"}", "number too long"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line_and_never_quoted(
    assert_refused: Callable[..., None], tmp_path: Path, bad: bytes, reason: str
) -> None:
    good = line(text="fine").encode()
    source = write(tmp_path / "a.jsonl", good + b"\n" + bad + b"\n" + good)
    assert_refused(source, f"{source}, line 3: ", reason, "data.on-bad-row")


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_skipped_lines_are_counted_and_the_rest_keep_theirs(tmp_path: Path, bad: bytes, reason: str) -> None:
    good = line(text="fine").encode()
    source = write(tmp_path / "a.jsonl", good + b"\n" + bad + b"\n" + good)
    rows = read_rows(source)
    assert rows.rows == ({"text": "fine"}, {"text": "fine"})
    assert rows.origins == ((source, 1), (source, 4))
    assert [(bad_row.file, bad_row.line) for bad_row in rows.bad] == [(source, 3)]
    assert reason in rows.bad[0].reason
    assert SECRET not in repr(rows.bad)


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "\\ud83d\\ude00"}')
    rows = read_rows(source)
    assert [row["text"] for row in rows.rows] == ["one", "\U0001f600"]
    assert rows.bad == ()


def test_json_holds_a_list_of_rows_bare_or_under_data(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    bare = write(tmp_path / "bare.json", json.dumps(rows))
    wrapped = write(tmp_path / "wrapped.json", "\ufeff" + json.dumps({"data": rows}))
    assert read_rows(bare).rows == read_rows(wrapped).rows == tuple(rows)
    assert read_rows(bare).origins == ((bare, 1), (bare, 2))


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (f'[\n{{"text": "{SECRET}"\n'.encode(), "line 3: not valid JSON"),
        (f'{{"text": "{SECRET}"}}\n{{"text": "{SECRET}"}}'.encode(), "line 2: not valid JSON"),
        (f'[\n"{SECRET} \xe9"]'.encode("latin-1"), "line 2: not UTF-8"),
        (f'{{"{SECRET}": []}}'.encode(), "line 1: holds no list"),
        (b"[" * 100_000, "nesting too deep"),
        (f'[{{}}, "{SECRET}"]'.encode(), "line 2: not an object"),
        (f'[{{}}, {{}}, {{"text": "{SECRET}\\udc00"}}]'.encode(), "line 3: holds a lone surrogate"),
    ],
)
def test_a_bad_json_document_is_refused_with_its_place(
    assert_refused: Callable[..., None], tmp_path: Path, content: bytes, where: str
) -> None:
    source = write(tmp_path / "a.json", content)
    assert_refused(source, source, where)


def test_csv_records_may_span_lines_and_know_where_they_start(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", '\ufeffprompt,response\r\n"two\nlines",x\r\n\r\n"a ""b""","c, d"\r\n')
    rows = read_rows(source)
    assert [tuple(row.values()) for row in rows.rows] == [("two\nlines", "x"), ('a "b"', "c, d")]
    assert [number for _, number in rows.origins] == [2, 5]
    assert list(rows.rows[0]) == ["prompt", "response"]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (f"prompt,response\na,b\n{SECRET}\n".encode(), "line 3: 1 cells where the header has 2"),
        (f"prompt,response\na,b\n{SECRET},c,d\n".encode(), "line 3: 3 cells"),
        (f"prompt,response\na,b\n{SECRET} \xe9,c\n".encode("latin-1"), "line 3: not UTF-8"),
        (f'prompt,response\na,b\n"{SECRET}\nmore,c\n'.encode(), "line 3: not a CSV record"),
        (f"prompt,response\na,b\n{SECRET * 20_000},c\n".encode(), "line 3: not a CSV record"),
        (f"{SECRET},{SECRET}\na,b\n".encode(), "line 1: a CSV header"),
        (f'"{SECRET}\n'.encode(), "line 1: the CSV header"),
    ],
)
def test_a_bad_csv_record_is_refused_with_its_line(
    assert_refused: Callable[..., None], tmp_path: Path, content: bytes, where: str
) -> None:
    source = write(tmp_path / "a.csv", content)
    assert_refused(source, source, where)


def test_a_bad_csv_record_does_not_shift_the_next(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "prompt,response\nonly\na,b\n")
    assert read_rows(source).rows == ({"prompt": "a", "response": "b"},)
    assert read_rows(source).origins == ((source, 3),)


def test_a_paragraph_of_text_is_a_row(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "\n\none\ntwo\n \n\nthree")
    rows = read_rows(source)
    assert rows.rows == ({"text": "one\ntwo"}, {"text": "three"})
    assert rows.origins == ((source, 3), (source, 7))


def test_a_paragraph_that_is_not_utf8_names_the_line_of_the_byte(
    assert_refused: Callable[..., None], tmp_path: Path
) -> None:
    source = write(tmp_path / "a.txt", f"one\n\n{SECRET}\ncaf\xe9\n\ntwo".encode("latin-1"))
    assert_refused(source, f"{source}, line 4: not UTF-8 text at byte 4")
    assert [row["text"] for row in read_rows(source).rows] == ["one", "two"]


def test_parquet_rows_are_read_with_nested_values_and_nulls(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "a"}], "n": 1}, {"messages": None, "n": None}]
    source = str(tmp_path / "a.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), source)
    assert read_rows(source).rows == tuple(rows)
    assert read_rows(source).origins == ((source, 1), (source, 2))


def test_parquet_text_that_is_not_utf8_is_a_bad_row(
    assert_refused: Callable[..., None], tmp_path: Path
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = arrow.array([b"fine", SECRET.encode() + b"\xff"]).view(arrow.string())
    source = str(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"text": cells}), source)
    assert read_rows(source).rows == ({"text": "fine"},)
    assert_refused(source, f"{source}, line 2: not UTF-8")


def test_a_damaged_parquet_file_is_refused(assert_refused: Callable[..., None], tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "a.parquet", SECRET * 10), "not a readable parquet file")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_an_empty_file_has_no_rows(tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path / f"a{suffix}", "")
    assert read_rows(source) == Rows((), (), (source,), ())
