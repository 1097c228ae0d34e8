"""What servers asked is counted over runs, in a period, and by whoever counts at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clients.asked import SECONDS_A_DAY, Asked, Asking, count, count_on_disk, count_update
from fedllm.errors import CheckpointError, PolicyError, QueryLimitError
from fedllm.site_policy import Limits


def asking(action: str = "evaluate", run: str = "a", day: float = 0.0, steps: int = 1) -> Asking:
    is_measured = action == "evaluate"
    return Asking(run=run, action=action, steps=steps, is_measured=is_measured, now=day * SECONDS_A_DAY)


def test_what_is_older_than_the_period_is_forgotten() -> None:
    limits = Limits(evaluations=2, runs=1, period_days=7)
    asked = Asked()
    for day in (0, 3):
        asked = count(asked, asking(day=day), limits)
    with pytest.raises(QueryLimitError, match=r"evaluations = 2 in 7 days are used up"):
        count(asked, asking(day=6.9), limits)
    with pytest.raises(PolicyError, match=r"runs = 1 in 7 days"):
        count(asked, asking("join", run="b", day=6.9), limits)
    assert len(count(asked, asking(day=7.1), limits).evaluations) == 2
    assert set(count(asked, asking("join", run="b", day=7.1), limits).runs) == {"a", "b"}


def test_a_clock_set_back_forgets_nothing() -> None:
    limits = Limits(evaluations=1)
    asked = count(Asked(), asking(day=100), limits)
    with pytest.raises(QueryLimitError):
        count(asked, asking(day=1), limits)


def test_without_limits_all_is_counted_and_nothing_refused() -> None:
    asked = Asked()
    for number in range(20):
        asked = count_update(count(asked, asking("train", steps=3), Limits()), "a")
        asked = count(asked, asking("evaluate", day=number), Limits())
        asked = count(asked, asking("overlap", day=number), Limits())
    assert (asked.runs["a"].trainings, asked.runs["a"].steps, asked.runs["a"].overlaps) == (20, 60, 20)
    assert len(asked.evaluations) == len(asked.overlaps) == 20


def test_of_many_that_count_at_once_none_is_lost(tmp_path: Path) -> None:
    def ask(number: int) -> None:
        count_on_disk(tmp_path, "rows", lambda asked: count(asked, asking(), Limits(evaluations=60)))

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(ask, number) for number in range(80)]
    errors = [one.exception() for one in done]
    assert sum(error is None for error in errors) == 60
    assert sum(isinstance(error, QueryLimitError) for error in errors) == 20


def test_each_data_set_has_a_count_of_its_own(tmp_path: Path) -> None:
    limits = Limits(evaluations=1)
    for data_set in ("/data/a", "/data/b"):
        count_on_disk(tmp_path, data_set, lambda asked: count(asked, asking(), limits))
    with pytest.raises(QueryLimitError):
        count_on_disk(tmp_path, "/data/a", lambda asked: count(asked, asking(), limits))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"runs": 1}', '{"runs": {"a": {"x": 1}}}'])
def test_a_damaged_count_is_not_begun_anew(content: str, tmp_path: Path) -> None:
    count_on_disk(tmp_path, "rows", lambda asked: count(asked, asking(), Limits()))
    (file,) = tmp_path.glob("*.json")
    file.write_text(content)
    with pytest.raises(CheckpointError, match="how often was asked is not known"):
        count_on_disk(tmp_path, "rows", lambda asked: count(asked, asking(), Limits()))
    assert file.read_text() == content
