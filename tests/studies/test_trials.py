import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.errors import ConfigError, DataError, RunFailedError
from scripts.studies.trials import Figures, Setting, Trial, TrialRunner, describe, read_journal

SETTING = Setting("model", "rows.jsonl", {"lora.rank": 4}, "digest")
DONE: list[int] = []


def square(trial: Trial, setting: Setting) -> Figures:
    """Note the seed and return its square."""
    seed = int(trial.flat["seed"])
    DONE.append(seed)
    if seed == 13:
        raise ConfigError("no such key")
    if seed == 14:
        raise RunFailedError("too few updates")
    return {"mean_after": float(seed**2)}


def trial(seed: int, **labels: int) -> Trial:
    return Trial("test", "square", labels, {"seed": seed})


@pytest.fixture
def runner(tmp_path: Path) -> TrialRunner:
    DONE.clear()
    return TrialRunner(SETTING, {"square": square}, tmp_path / "trials.jsonl", "abc")


def test_the_key_is_what_the_result_depends_on_and_no_label() -> None:
    assert SETTING.key(trial(1, row=1)) == SETTING.key(trial(1, row=2))
    others = [trial(2), replace(trial(1), kind="cube"), replace(trial(1), options={"malicious": 1})]
    settings = [replace(SETTING, digest="other"), replace(SETTING, flat={"lora.rank": 8})]
    keys = {SETTING.key(trial(1)), *map(SETTING.key, others), *(s.key(trial(1)) for s in settings)}
    assert len(keys) == 6
    moved = replace(SETTING, model="elsewhere", source="moved.jsonl")
    assert moved.key(trial(1)) == SETTING.key(trial(1))


def test_finished_cells_are_not_done_again(runner: TrialRunner) -> None:
    first = runner([trial(1), trial(2)])
    again = runner([trial(2, row=5), trial(3), trial(1)])
    assert DONE == [1, 2, 3]
    assert [outcome.figures["mean_after"] for outcome in (*first, *again)] == [1, 4, 4, 9, 1]
    assert again[0].trial.labels == {"row": 5}
    assert {line["commit"] for line in map(json.loads, runner.journal.read_text().splitlines())} == {"abc"}


def test_equal_cells_of_one_call_are_done_once(runner: TrialRunner) -> None:
    assert [o.trial.labels["row"] for o in runner([trial(1, row=1), trial(1, row=2)])] == [1, 2]
    assert DONE == [1]


def test_a_line_that_was_cut_short_is_done_again(runner: TrialRunner) -> None:
    runner([trial(1), trial(2)])
    text = runner.journal.read_text()
    runner.journal.write_text(text[:-20] + "\n")
    runner([trial(1), trial(2)])
    assert DONE == [1, 2, 2]


def test_what_follows_half_a_line_is_kept(runner: TrialRunner) -> None:
    runner([trial(1)])
    runner.journal.write_text(runner.journal.read_text()[:-20])  # no end of line: killed while it wrote
    runner([trial(1)])
    runner([trial(1)])
    assert DONE == [1, 1]


def test_what_is_refused_is_asked_again_and_what_failed_is_not(runner: TrialRunner) -> None:
    refused, failed = runner([trial(13), trial(14)])
    assert (refused.reason, failed.reason) == ("refused: no such key", "failed: too few updates")
    assert not refused.is_done
    runner([trial(13), trial(14)])
    assert DONE == [13, 14, 13]
    assert "too few updates" in describe(failed)


def test_a_journal_that_is_no_text_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    assert read_journal(file) == {}
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="remove it to start afresh"):
        read_journal(file)
