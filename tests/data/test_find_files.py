import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.data.find_files import find_files
from fedllm.data.rows import is_local, read_rows
from fedllm.errors import DataError
from tests.data.builders import line, write

SHARD = "{}-00000-of-00001.jsonl"


def place(folder: Path, *names: str) -> str:
    """Write a file of one row under each name and return the folder."""
    for name in names:
        write(folder / name, line(text=name))
    return str(folder)


def names_of(source: str, split: str = "train") -> list[str]:
    return [str(row["text"]) for row in read_rows(source, split=split).rows]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl", "valid.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["a_train.jsonl", "a_test.jsonl"], "train", ["a_train.jsonl"]),
        (["train-data.jsonl", "dev-data.jsonl"], "train[:10]", ["train-data.jsonl"]),
        (["letters.jsonl", "test.jsonl"], "train", ["letters.jsonl"]),
        (["train/a.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl"]),
        (
            [f"data/{SHARD.format(name)}" for name in ("train", "test")],
            "train",
            [f"data/{SHARD.format('train')}"],
        ),
        (
            [SHARD.format(name) for name in ("train_a", "train_b", "test_a")],
            "train_a",
            [SHARD.format("train_a")],
        ),
        (["train.jsonl", "test.jsonl"], "train+test", ["test.jsonl", "train.jsonl"]),
        (
            ["contest.jsonl", "latest.jsonl", "training-day.jsonl"],
            "train",
            ["contest.jsonl", "latest.jsonl", "training-day.jsonl"],
        ),
    ],
)
def test_of_a_data_set_only_the_split_is_read(
    tmp_path: Path, names: list[str], split: str, expected: list[str]
) -> None:
    assert names_of(place(tmp_path, *names), split) == expected


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    folder = place(tmp_path, "test.jsonl", "dev.jsonl")
    with pytest.raises(DataError, match=r"no split 'train'.*\(test, validation\).*data\.split"):
        read_rows(folder)


def test_what_is_named_itself_is_read_whatever_its_split(tmp_path: Path) -> None:
    folder = place(tmp_path / "test", "a.jsonl", "test.jsonl", "train.jsonl")
    assert names_of(f"{folder}/test.jsonl") == ["test.jsonl"]
    assert names_of(f"{folder}/te*.jsonl") == ["test.jsonl"]
    assert names_of(folder) == ["a.jsonl", "train.jsonl"]  # its own name is no split
    assert names_of(f"{folder}/*.jsonl") == ["a.jsonl", "train.jsonl"]


def test_a_folder_says_in_one_line_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = place(
        tmp_path, "a.jsonl", "test.jsonl", "b.jsonl.gz", "notes.md", ".hidden.jsonl", "old/c.jsonl"
    )
    write(tmp_path / "dataset_info.json", json.dumps({"a": {"file_name": "a.jsonl"}}))
    write(tmp_path / ".gitattributes", "")
    assert names_of(folder) == ["a.jsonl"]
    (told,) = caplog.messages
    for part in (
        "files read: 1",
        ".gz (unpack it first)",
        "1 .md",
        "1 hidden",
        "1 subfolders",
        "splits (test)",
    ):
        assert part in told
    assert "1 that describe a data set" in told
    caplog.clear()
    assert names_of(place(tmp_path / "plain", "a.jsonl", "b.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert caplog.messages == []


def test_a_downloaded_data_set_is_read_through_its_folders(tmp_path: Path) -> None:
    folder = place(tmp_path, f"data/{SHARD.format('train')}", f"data/{SHARD.format('test')}", "README.md")
    place(tmp_path, ".cache/a.jsonl")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    assert names_of(folder) == [f"data/{SHARD.format('train')}"]
    assert names_of(f"{folder}/*") == [f"data/{SHARD.format('train')}"]


def test_a_saved_data_set_is_read_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = {
        name: datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(5)])
        for name in ("train", "test")
    }
    parts["train"].save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    write(tmp_path / "one" / "cache-0123456789abcdef.arrow", "what a map computed")
    caplog.set_level(logging.WARNING, logger="fedllm")
    for folder in ("one", "several"):
        rows = read_rows(str(tmp_path / folder))
        assert [row["text"] for row in rows.rows] == [f"train {i}" for i in range(5)]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "cure"),
    [("a.jsonl.gz", "unpack it"), ("a.zip", "unpack it"), ("a.xlsx", "save the sheet as .csv")],
)
def test_a_compressed_file_is_refused_with_what_to_do(
    assert_refused: Callable[..., None], tmp_path: Path, name: str, cure: str
) -> None:
    place(tmp_path, name)
    assert_refused(str(tmp_path / name), "not a kind of file", cure)
    assert_refused(str(tmp_path), "no file that is read", cure)
    assert_refused(str(tmp_path / "*"), "no file that is read", cure)


def test_a_compressed_file_that_is_absent_is_no_hub_data_set() -> None:
    assert is_local("rows.jsonl.gz")
    assert not is_local("owner/rows.v2")


def test_a_file_in_two_parts_of_a_list_is_read_once(tmp_path: Path) -> None:
    folder = place(tmp_path, "a.jsonl", "b.jsonl")
    assert find_files(f"{folder}/b.jsonl,{folder}") == (f"{folder}/b.jsonl", f"{folder}/a.jsonl")


@pytest.mark.parametrize(("split", "folder"), [("train", "train_sft"), ("test_sft", "test_sft")])
def test_a_saved_split_may_have_a_longer_name(split: str, folder: str, tmp_path: Path) -> None:
    for name in ("train_sft", "test_sft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data-00000-of-00001.arrow").touch()
    assert find_files(str(tmp_path), split) == (str(tmp_path / folder / "data-00000-of-00001.arrow"),)


@pytest.mark.parametrize("form", ["{}-00000-of-00001.parquet", "{}/data-00000-of-00001.arrow"])
def test_a_shard_next_to_the_split_is_another_split(form: str, tmp_path: Path) -> None:
    for name in ("train", "unsupervised"):
        (tmp_path / form.format(name)).parent.mkdir(exist_ok=True)
        (tmp_path / form.format(name)).touch()
    for name in ("train", "unsupervised"):
        assert find_files(str(tmp_path), name) == (str(tmp_path / form.format(name)),)
