"""Pages say what was found, hold nothing that acts or is private, and never cost a run its result."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Example
from fedllm.errors import ConfigError
from fedllm.evaluation.intervals import Estimate
from fedllm.evaluation.score import AdapterResult, TaskResult
from fedllm.evaluation.task import Item, Task
from fedllm.runs.folder import describe_run, read_keys
from fedllm.runs.records import RoundRecord, TrainingRecord
from scripts.evaluation.kept import keep
from scripts.reporting.page import plot_losses, reported, write_report
from scripts.reporting.run_files import shown_value
from tests.scripts.reporting.conftest import CLIENTS, HOSTILE, losses, records


def page_of(folder: Path, *others: Path) -> str:
    return write_report(folder, *others).read_text()


def test_a_page_begins_with_what_joining_brought(make_run: Callable) -> None:
    text = page_of(make_run())
    assert '<p class="finding">Joining brought 3 of 4 data holders a lower loss than training alone' in text
    assert "Not so: news." in text
    assert "The mean held-out loss fell from 4.515 to 3.615" in text


def test_a_page_without_the_question_says_so(make_run: Callable) -> None:
    text = page_of(make_run(rounds=records(with_home=False)))
    assert '<p class="finding">Training together lowered the mean held-out loss from 4.515 to 3.615' in text
    assert "gained over training alone was not measured" in text


def test_a_page_shows_costs_steps_and_who_was_lost(make_run: Callable) -> None:
    text = page_of(make_run())
    assert "The rounds sent 9 MB up and down" in text
    assert "at most 15.0% here" in text  # rho
    assert "Of 12 requests to train 9 were answered by a sound update" in text
    assert "Distillation: 1 of 1 steps were kept" in text
    assert "<td>75%</td>" in text
    assert "<b>6.00</b>" in text  # epsilon


def test_a_page_shows_tasks_with_their_intervals(make_run: Callable) -> None:
    adapter = AdapterResult({"accuracy": Estimate(0.5, 0.25, 0.75)}, {}, (), ())
    items = tuple(Item(Example(text="Why?"), ("a", "b"), right=right) for right in (0, 1))
    result = TaskResult(Task("quiz", "choice", items), {"base": adapter})
    folder = make_run()
    keep(folder, {"tasks": {"quiz": result.to_dict()}})
    cells = ("quiz", "2", "base", "accuracy", "0.500", "0.250 to 0.750", "0.500", "0.500")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page_of(folder)


def test_names_and_answers_cannot_act(make_run: Callable, study: Path) -> None:
    for text in (page_of(make_run()), page_of(study), page_of(make_run("other"), make_run("third"))):
        assert "<script" not in text.lower()
        assert "&lt;script&gt;" in text
        assert not any(word in text for word in ("src=", "href=", "url(", "@import", "http:", "https:"))


def test_a_page_holds_no_path_and_nothing_private(make_run: Callable, tmp_path: Path) -> None:
    folder = make_run()
    (folder / "private").mkdir()
    (folder / "private" / "secret").write_text("4711")
    text = page_of(folder)
    assert str(tmp_path) not in text
    assert "4711" not in text
    assert (folder / "report.html").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/ann/rows.jsonl", "…/rows.jsonl"),
        ("rows.jsonl,/home/ann/more.jsonl, ~/last.jsonl", "rows.jsonl,…/more.jsonl, …/last.jsonl"),
        ("synthetic+../public/texts.txt", "synthetic+…/texts.txt"),
        ("org/model@v1.0", "org/model@v1.0"),
        (0.01, "0.01"),
    ],
)
def test_a_setting_names_no_folder_of_this_machine(value: str | float, shown: str) -> None:
    assert shown_value(value) == shown


def test_two_runs_are_compared_on_clients_in_common(make_run: Callable) -> None:
    better = [replace(one, held_out={**losses(one.round_num + 1), "anna": 9.0}) for one in records()]
    text = page_of(make_run("first"), make_run("second", better))
    assert "second ends at a mean held-out loss of 3.315, first at 3.615." in text
    assert "4 of 4 data holders are better served by second" in text
    assert "anna" not in text
    assert "No setting differs" in text


def test_curves_of_two_runs_are_of_the_same_clients(make_run: Callable) -> None:
    more = [replace(one, held_out={**one.held_out, "anna": 9.0}) for one in records()]
    text = page_of(make_run("first"), make_run("second", more))
    first, second = re.findall('points="([^"]*)"', text)[:2]
    assert first == second


def test_a_study_says_to_whom_joining_helped(study: Path) -> None:
    text = page_of(study)
    assert "gives 2 of 2 clients a lower loss than training alone" in text
    assert "The lowest mean loss, 3.500, is that of federated" in text


def test_a_run_that_failed_has_its_page_and_its_error(make_run: Callable) -> None:
    folder, told = make_run(status="failed", reason="no space"), []
    with pytest.raises(RuntimeError, match="the run's own"), reported(folder, told.append):
        raise RuntimeError("the run's own")
    assert "The run failed: no space." in (folder / "report.html").read_text()
    assert told == []


def test_a_damaged_file_costs_the_page_and_not_the_run(make_run: Callable) -> None:
    folder, told = make_run(digest="d"), []
    (folder / "audit.json").write_text(json.dumps({"adapter": "d", "membership": {}}))
    with reported(folder, told.append):
        pass
    assert len(told) == 1
    assert "damaged, or of another version" in told[0]


def test_a_run_without_any_measure_has_a_page(make_run: Callable) -> None:
    empty = [replace(one, held_out={}, at_home=None, privacy=None, distillation=None) for one in records()]
    assert "It is not known how good the adapter is" in page_of(make_run(rounds=empty))
    assert "The rounds sent 0 MB" in page_of(make_run("begun", empty[:1]))


def test_clients_that_all_changed_are_not_compared(make_run: Callable) -> None:
    first, *_, last = records(with_home=False)
    text = page_of(make_run(rounds=[first, replace(last, held_out={"new": 2.0})]))
    assert "It is not known how good the adapter is" in text


def test_a_private_run_is_private_before_it_is_complete(make_run: Callable) -> None:
    folder = make_run(status="failed", reason="no space")
    keys = read_keys(folder) | {"privacy.epsilon": 8.0, "privacy.unit": "client"}
    describe_run(folder, RunConfig.from_flat(keys))
    (folder / "privacy.json").write_text('{"epsilon": 0.5}')  # of an earlier session, which had spent less
    text = page_of(folder)
    assert "No differential privacy" not in text
    assert "Differential privacy, not stated yet" in text
    assert "<b>6.00</b>" in text


def test_a_page_counts_the_data_holders_it_does_not_draw(make_run: Callable) -> None:
    trained = TrainingRecord(losses={f"c{place:02}": 3.0 + place for place in range(30)})
    only = [RoundRecord(round_num=1, training=trained)]
    text = page_of(make_run(rounds=only))
    assert "Of 30 data holders the 20 with the largest losses are drawn." in text
    assert "c29" in text
    assert "c09" not in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report(tmp_path)


def test_the_same_run_gives_the_same_page_and_plot(make_run: Callable) -> None:
    folder = make_run()
    assert page_of(folder) == page_of(folder)
    drawn = plot_losses(folder, folder / "losses.svg").read_text()
    assert drawn.startswith("<svg ")
    assert HOSTILE not in drawn
    assert CLIENTS[0] in drawn
    with pytest.raises(ConfigError, match=r"\.svg"):
        plot_losses(folder, folder / "losses.png")
