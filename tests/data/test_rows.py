from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedllm.data.find_files import find_files
from fedllm.data.rows import is_local, read_rows
from fedllm.errors import ConfigError
from tests.data.builders import SECRET, line, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", line(text=name))
    write(tmp_path / "notes.md", "not data")
    write(tmp_path / ".hidden.jsonl", line(text="hidden"))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{0}", "abc"),
        ("{0}/*.jsonl", "abc"),
        ("{0}/*", "abc"),
        ("{0}/[bc].jsonl", "bc"),
        ("{0}/c.jsonl,{0}/a.jsonl", "ca"),
        ("{0}/c.jsonl, {0}/*.jsonl", "cab"),
    ],
)
def test_folders_globs_and_lists_name_each_file_once_in_order(
    folder: Path, source: str, expected: str
) -> None:
    rows = read_rows(source.format(folder))
    assert "".join(row["text"] for row in rows.rows) == expected
    assert [Path(file).stem for file in rows.files] == list(expected)


def test_a_file_whose_name_has_a_comma_or_a_bracket_is_one_file(tmp_path: Path) -> None:
    source = write(tmp_path / "a,b[1].jsonl", line(text="x"))
    assert find_files(source) == (source,)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{0}/absent.jsonl", "no such file"),
        ("absent.jsonl", "no such file"),
        ("./absent", "no such file"),
        ("deep/er/absent", "no such file"),
        ("{0}/a.jsonl,{0}/absent.jsonl", "no such file"),
        ("{0}/*.csv", "matches no file"),
        ("{0}/empty", "no file that is read"),
        ("{0}/notes.md", "not a kind of file"),
        (" , ", "data.source is empty"),
        ("", "data.source is empty"),
    ],
)
def test_source_without_data_is_refused_without_the_hub(
    assert_refused: Callable[..., None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    expected: str,
) -> None:
    monkeypatch.setattr("fedllm.data.rows._hub_rows", lambda *_: pytest.fail("the hub was asked"))
    (folder / "empty").mkdir()
    assert_refused(source.format(folder), expected)


def test_a_file_that_cannot_be_opened_is_refused(
    assert_refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: str) -> Iterator[Any]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fedllm.data.rows.READERS", {".jsonl": deny})
    source = write(tmp_path / "a.jsonl", line(text=SECRET))
    assert_refused(source, source, "cannot be read (Permission denied)")


@pytest.mark.parametrize("source", ["squad", "openai/gsm8k", "openai/gsm8k:main"])
def test_a_plain_id_is_not_local(source: str) -> None:
    assert not is_local(source)


@pytest.mark.parametrize("source", ["json", "csv:default", "text", "parquet", "imagefolder"])
def test_a_reader_of_local_files_is_no_data_set(
    assert_refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """`datasets` would read whatever files of that kind lie below the working directory."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "private.json", line(text=SECRET))
    assert_refused(source, "no data set but a reader of local files")


@pytest.mark.parametrize("source", ["private", "private:default", "a/private", "a/private:default"])
def test_folder_that_lies_here_is_local_with_any_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / source.partition(":")[0]).mkdir(parents=True)
    assert is_local(source)


def test_a_hub_data_set_is_read_by_id_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((arguments, options))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("owner/name:main", split="test")
    assert asked == [(("hf://datasets/owner/name", "main"), {"split": "test", "revision": None})]
    assert rows.rows == ({"text": "a"}, {"text": "b"})
    assert rows.origins == (("owner/name:main", 1), ("owner/name:main", 2))


@pytest.mark.parametrize(
    "kind", [ConnectionError, ValueError, RuntimeError, KeyError, "DatasetGenerationError"]
)
def test_hub_failure_is_one_line_with_what_else_is_accepted(
    assert_refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    datasets = pytest.importorskip("datasets")
    error = getattr(datasets.exceptions, kind) if isinstance(kind, str) else kind

    def fail(*_: Any, **__: Any) -> None:
        raise error(f"near {SECRET}\nin row 5")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert_refused("owner/name", "owner/name", "no such file", "data.split", ".jsonl", error.__name__)


def test_an_unknown_policy_for_bad_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="skip, stop"):
        read_rows(write(tmp_path / "a.jsonl", line(text="a")), on_bad_row="ignore")
