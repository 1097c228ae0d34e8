"""Where tasks come from: files, folders, pinned sets of the hub, suites with and without the hub."""

import json
import re
from pathlib import Path

import datasets
import pytest

from fedllm.errors import ConfigError, DataError
from fedllm.evaluation.sources import SUITES, named_tasks, suite_tasks

ROW = {"question": "Why?", "choices": ["a", "b"], "answer": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("piqa", "other"):
        (tmp_path / f"{name}.jsonl").write_text(3 * (json.dumps(ROW) + "\n"))
    (tmp_path / "README.md").write_text("not a task")
    return tmp_path


def test_each_file_of_a_folder_is_a_task(folder: Path) -> None:
    found = {task.name: len(task.items) for task in named_tasks(str(folder), limit=2)}
    assert found == {"other": 2, "piqa": 2}
    assert [task.name for task in named_tasks(f"{folder / 'piqa.jsonl'}, {folder / 'other.jsonl'}")] == [
        *("piqa", "other")
    ]


def test_a_limit_spreads_over_a_file_sorted_by_subject(tmp_path: Path) -> None:
    rows = [{**ROW, "question": f"{place}"} for place in range(9)]
    (tmp_path / "sorted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = named_tasks(str(tmp_path), limit=3)
    assert [item.prompt.text[len("Question: ")] for item in task.items] == ["0", "3", "6"]


def test_two_tasks_of_one_name_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="two tasks are called piqa"):
        named_tasks(f"{folder},{folder / 'piqa.jsonl'}")


@pytest.mark.parametrize("names", [".", ","])
def test_where_there_is_no_task_a_line_says_so(
    names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no file of tasks there"):
        named_tasks(names)


def test_a_suite_takes_its_files_from_a_folder(folder: Path) -> None:
    tasks, missing = suite_tasks("general", str(folder))
    assert [task.name for task in tasks] == ["piqa"]
    assert missing == ["arc_easy", "openbookqa", "boolq", "mmlu"]
    with pytest.raises(DataError, match="none of the suite's files"):
        suite_tasks("medical", str(folder))
    with pytest.raises(ConfigError, match="general, keyboard, medical"):
        suite_tasks("generl")


def test_suites_name_whole_commits_of_the_hub() -> None:
    sources = [source for suite in SUITES.values() for source in suite]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}(:[\w.-]+)?", source.rows) for source in sources)


def test_the_hub_is_asked_for_the_pinned_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, configuration: str | None, **options: str) -> list[dict]:
        asked.append((path, configuration, options))
        return [ROW] * 3

    monkeypatch.setattr(datasets, "load_dataset", load)
    tasks = named_tasks("owner/set@0a1b:main", split="validation")
    assert [task.name for task in tasks] == ["set"]
    assert asked == [("hf://datasets/owner/set", "main", {"split": "validation", "revision": "0a1b"})]


def test_a_hub_out_of_reach_is_one_line_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"task piqa: .* name the folder by --tasks") as raised:
        suite_tasks("general")
    assert "\n" not in str(raised.value)
