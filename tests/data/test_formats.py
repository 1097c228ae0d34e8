import bz2
import datetime
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.data.formats import read_csv
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


JSON_ROWS = ({"text": "a", "n": {"b": [1, 2]}}, {"text": "c, d"})


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(JSON_ROWS),
        json.dumps(JSON_ROWS, indent=1),
        "[\n" + ",\n".join(map(json.dumps, JSON_ROWS)) + "\n]\n",
        "\n\n".join(json.dumps(row, indent=2) for row in JSON_ROWS),
        "".join(map(json.dumps, JSON_ROWS)),
        ",\n".join(map(json.dumps, JSON_ROWS)) + ",\n",
    ],
    ids=["list", "printed list", "list of lines", "printed objects", "one line", "lines with commas"],
)
def test_json_in_a_file_of_lines_is_read_for_what_it_is(tmp_path: Path, content: str) -> None:
    rows = read_rows(write(tmp_path / "a.jsonl", "\ufeff" + content))
    assert rows.rows == JSON_ROWS
    assert rows.bad == ()


def test_printed_objects_know_the_line_they_start_on(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{\n "text": "a"\n}\n\n5\n{"text":\n "b"}')
    rows = read_rows(source)
    assert rows.origins == ((source, 1), (source, 6))
    assert [(bad.line, bad.reason) for bad in rows.bad] == [(5, "not an object but a number")]


def test_printed_objects_that_break_off_are_refused(
    assert_refused: Callable[..., None], tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", f'{{\n "text": "a"\n}}\n{{\n "text": "{SECRET}')
    assert_refused(source, f"{source}, line 4: not valid JSON", "one object on a line")


@pytest.mark.parametrize("first", ['{"text": "cut', '["a list"]', '{"text": "a"} x'])
def test_a_bad_first_line_costs_itself_alone(tmp_path: Path, first: str) -> None:
    source = write(tmp_path / "a.jsonl", f'{first}\n{line(text="b")}["c"]\n{line(text="d")}')
    rows = read_rows(source)
    assert [row["text"] for row in rows.rows] == ["b", "d"]
    assert [bad.line for bad in rows.bad] == [1, 3]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_absent_numbers_are_null_and_a_key_comes_once(tmp_path: Path, suffix: str) -> None:
    lines = ['{"text": "a", "n": NaN, "m": [-Infinity, 1]}', f'{{"text": "{SECRET}", "text": "b"}}']
    content = "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]"
    rows = read_rows(write(tmp_path / f"a{suffix}", content))
    assert rows.rows == ({"text": "a", "n": None, "m": [None, 1]},)
    assert [bad.reason for bad in rows.bad] == ["names a key twice"]


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
        (f'{{"train": ["{SECRET}"], "test": []}}'.encode(), 'no list of rows but something under "train"'),
        (f'{{"rows": [{{"row": "{SECRET}"}}]}}'.encode(), 'under "rows"'),
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


CSV_ROWS = ({"prompt": "a, b; c", "response": "d"}, {"prompt": "e", "response": 'f "g"'})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt;response\n"a, b; c";d\ne;"f ""g"""\n'),
        ("a.csv", 'prompt|response\n"a, b; c"|d\ne|"f ""g"""\n'),
        ("a.csv", 'prompt\tresponse\na, b; c\td\ne\t"f ""g"""\n'),
        ("a.tsv", '"prompt"\tresponse\ta, b, c\na, b; c\td\t\ne\t"f ""g"""\t\n'),
        ("a.csv", 'sep=;\r\nprompt;response\r\n"a, b; c";d\r\ne;"f ""g"""\r\n;\r\n'),
        ("a.csv", '"prompt", "response"\n"a, b; c", "d"\ne, "f ""g"""\n'),
        ("a.csv", ',prompt,response,,\n0,"a, b; c",d,,\n1,e,"f ""g""",,\n,,,,\n'),
    ],
    ids=["semicolon", "bar", "tab", "tsv", "excel", "spaces", "nameless"],
)
def test_csv_of_other_programs_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    rows = read_rows(write(tmp_path / name, content))
    assert [{name: row[name] for name in ("prompt", "response")} for row in rows.rows] == list(CSV_ROWS)
    assert all("" not in row for row in rows.rows)
    assert rows.bad == ()


def test_a_comma_stays_the_delimiter_where_it_can_be(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", '"a;b;c;d",text|x\n1;2,3|4\n')
    assert read_rows(source).rows == ({"a;b;c;d": "1;2", "text|x": "3|4"},)
    assert read_rows(write(tmp_path / "b.csv", "text\na; b\n")).rows == ({"text": "a; b"},)


@pytest.mark.parametrize("closed_at", [None, 6])
def test_an_open_quote_names_and_counts_what_it_took(tmp_path: Path, closed_at: int | None) -> None:
    """The quote of line 3 ends at the end of the file, or where the quote of line 6 begins."""
    cells = {number: f"{SECRET}{number},b" for number in range(2, 11)} | {3: f'"{SECRET},b'}
    if closed_at:
        cells[closed_at] = f'"{SECRET}",b'
    source = write(tmp_path / "a.csv", "\n".join(["prompt,response", *cells.values()]))
    rows, last = read_rows(source), closed_at or 10
    assert [number for _, number in rows.origins] == [2, *range(last + 1, 11)]
    assert [bad.line for bad in rows.bad] == list(range(3, last + 1))
    assert rows.bad[0].reason.endswith(f"lines 3 to {last}")
    assert {bad.reason for bad in rows.bad[1:]} == {"inside the quote that line 3 leaves open"}
    assert SECRET not in repr(rows.bad)


def test_lines_of_a_long_cell_are_no_rows_of_their_own(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", 'prompt,response\n"one\ntwo\nthree",b,c\nd,e\n')
    rows = read_rows(source)
    assert [(bad.line, bad.reason) for bad in rows.bad] == [
        (2, "3 cells where the header has 2; it takes in lines 2 to 4")
    ]
    assert rows.origins == ((source, 5),)


def test_text_with_a_nul_character_is_a_bad_row(tmp_path: Path) -> None:
    long = "text " * 20
    for name, content in {"a.csv": f"text\n{long}\na\0b\n", "a.txt": f"{long}\n\na\0b\n"}.items():
        rows = read_rows(write(tmp_path / name, content))
        assert [row["text"].strip() for row in rows.rows] == [long.strip()]
        assert ["NUL" in bad.reason for bad in rows.bad] == [True]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (line(text=SECRET).encode("utf-16"), "save the file as UTF-8"),
        (line(text=SECRET).encode("utf-16-le"), "save the file as UTF-8"),
        (gzip.compress(line(text=SECRET).encode()), "gzip; unpack it"),
        (bz2.compress(line(text=SECRET).encode()), "bzip2; unpack it"),
        (lzma.compress(line(text=SECRET).encode()), "xz; unpack it"),
        (b"PK\x03\x04" + SECRET.encode(), "save the sheet as .csv"),
        (f"version https://git-lfs.github.com/spec/v1\noid {SECRET}\n".encode(), "git lfs pull"),
    ],
    ids=["utf-16", "utf-16 without mark", "gzip", "bzip2", "xz", "zip", "lfs"],
)
def test_other_content_than_the_name_says_is_told_with_its_cure(
    assert_refused: Callable[..., None], tmp_path: Path, name: str, content: bytes, cure: str
) -> None:
    source = write(tmp_path / name, content)
    assert_refused(source, source, cure)


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


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_columns_of_every_arrow_type_are_read(tmp_path: Path, kind: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    when = datetime.datetime(2020, 1, 2, 3, 4, tzinfo=datetime.UTC)
    turn = arrow.struct(
        [("role", arrow.string()), ("value", arrow.large_string()), ("at", arrow.timestamp("us"))]
    )
    turns = [{"role": "user", "value": "a", "at": None}, {"role": None, "value": "b", "at": None}]
    columns = {
        "kind": arrow.array(["x", None, "x"]).dictionary_encode(),
        "text": arrow.array(["a", "b", None], arrow.large_string()),
        "turns": arrow.array([turns, None, []], arrow.large_list(turn)),
        "at": arrow.array([when, None, when], arrow.timestamp("ms", tz="UTC")),
        "none": arrow.nulls(3),
    }
    table = arrow.table(columns)
    source = str(tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow"))
    if kind == "parquet":
        parquet.write_table(table, source)
    else:
        new = arrow.ipc.new_stream if kind == "stream" else arrow.ipc.new_file
        with new(source, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    rows = read_rows(source)
    assert [row["kind"] for row in rows.rows] == ["x", None, "x"]
    assert [row["text"] for row in rows.rows] == ["a", "b", None]
    assert rows.rows[0]["turns"] == turns
    assert [row["none"] for row in rows.rows] == [None] * 3
    assert rows.origins == tuple((source, number) for number in (1, 2, 3))


def test_a_table_that_names_a_column_twice_is_refused(
    assert_refused: Callable[..., None], tmp_path: Path
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = str(tmp_path / "a.parquet")
    parquet.write_table(arrow.Table.from_arrays([arrow.array([SECRET])] * 2, ["text", "text"]), source)
    assert_refused(source, source, "two columns of one name")


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
    assert_refused(write(tmp_path / "a.arrow", SECRET * 10), "not a readable Arrow file")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
def test_an_empty_file_has_no_rows(tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path / f"a{suffix}", "")
    assert read_rows(source) == Rows((), (), (source,), ())


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("prompt,response,a|b|c|d\nWhy?,So.,x\n", {"prompt": "Why?", "response": "So.", "a|b|c|d": "x"}),
        ("prompt,response,a;b;c;d\nWhy?,So.,\n", {"prompt": "Why?", "response": "So.", "a;b;c;d": ""}),
        ("prompt;cost, net, gross, all\n1,5;2,5\n", {"prompt": "1,5", "cost, net, gross, all": "2,5"}),
    ],
)
def test_records_tell_what_parts_cells_if_the_header_does_not(
    text: str, row: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text)
    assert list(read_csv(str(file))) == [(2, row)]
