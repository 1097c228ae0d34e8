"""A Flower run is followed without asking Flower often."""

from pathlib import Path

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.plan.run_plan import RunPlan, resolve
from fedllm.runs.folder import write_rounds
from fedllm.runs.records import RoundRecord
from scripts.console import Console
from scripts.run_view import RunView
from scripts.runtimes import flower
from scripts.runtimes.flower import follow
from scripts.runtimes.processes import Link
from scripts.runtimes.shown_rounds import ShownRounds
from tests.builders import Clock


def rounds(number: int) -> RunPlan:
    """Return the plan of a run of so many rounds."""
    return resolve(RunConfig.from_flat({"federation.num-rounds": number}))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(flower, "time", clock)
    return clock


def test_a_run_that_dies_silently_is_noticed_within_a_minute(clock, monkeypatch, tmp_path: Path):
    dies = 200.0

    def status(link: Link, run_id: str) -> str:
        clock.asked.append(clock.now)
        return "finished:failed" if clock.now >= dies else "running"

    monkeypatch.setattr(flower, "status", status)
    view = RunView(Console(quiet=True), rounds(2))
    assert follow(Link(tmp_path, 1), "7", tmp_path, ShownRounds(tmp_path, view)) == "finished:failed"
    assert clock.asked == pytest.approx([60, 120, 180, 240], abs=2)


def test_the_end_that_a_superlink_logs_is_noticed_at_once(clock, monkeypatch, tmp_path: Path):
    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now > 20:  # no worker fits, say: the run has no result
            (tmp_path / "superlink.log").write_text("INFO: Finished task 5 of run 7\n")

    (tmp_path / "superlink.log").write_text("INFO: Started task 5 of run 7\n")
    clock.sleep = sleep  # type: ignore[method-assign]
    monkeypatch.setattr(flower, "status", lambda link, run_id: "finished:failed")
    view = RunView(Console(quiet=True), rounds(2))
    assert follow(Link(tmp_path, 1), "7", tmp_path, ShownRounds(tmp_path, view)) == "finished:failed"
    assert clock.now < 21


def test_a_superlink_that_dies_ends_the_wait(clock, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(flower, "status", lambda link, run_id: "unknown")  # nobody answers
    view = RunView(Console(quiet=True), rounds(2))
    assert follow(Link(tmp_path, 1), "7", tmp_path, ShownRounds(tmp_path, view)).startswith("lost")
    assert clock.now < 62


def test_every_round_is_shown_once_and_the_result_ends_the_wait(clock, monkeypatch, tmp_path: Path):
    records = [RoundRecord(round_num=number) for number in range(4)]

    def write(number: int) -> None:
        write_rounds(tmp_path, records[:number])
        if number == len(records):
            (tmp_path / "result.json").write_text("{}")

    def sleep(seconds: float) -> None:
        clock.now += seconds
        write(min(len(records), 1 + int(clock.now)))

    clock.sleep = sleep  # type: ignore[method-assign]
    monkeypatch.setattr(flower, "status", lambda link, run_id: "finished:completed")
    shown: list[int] = []
    view = RunView(Console(quiet=True), rounds(3))
    view.record = lambda record: shown.append(record.round_num)  # type: ignore[method-assign]
    assert follow(Link(tmp_path, 1), "7", tmp_path, ShownRounds(tmp_path, view)) == "finished:completed"
    assert shown == [0, 1, 2, 3]
    assert clock.now < 5


def test_earlier_sessions_say_nothing_of_the_time_left(clock, monkeypatch, tmp_path: Path, capsys):
    records = [RoundRecord(round_num=number, seconds=100.0 if number < 3 else 7.0) for number in range(4)]
    write_rounds(tmp_path, records[:3])

    shown = ShownRounds(tmp_path, RunView(Console(), rounds(10)))

    def sleep(seconds: float) -> None:
        clock.now += seconds
        write_rounds(tmp_path, records)
        (tmp_path / "result.json").write_text("{}")

    clock.sleep = sleep  # type: ignore[method-assign]
    monkeypatch.setattr(flower, "status", lambda link, run_id: "finished:completed")
    follow(Link(tmp_path, 1), "7", tmp_path, shown)
    lines = [line for line in capsys.readouterr().out.splitlines() if "round" in line]
    assert ["left" in line for line in lines] == [False, False, False, True]
    assert lines[-1].endswith("left 49 s")


def test_time_left_is_that_of_this_sessions_rounds(capsys):
    view = RunView(Console(), rounds(10))
    for number in (6, 7):  # the run was resumed after round 5
        view.record(RoundRecord(round_num=number, seconds=3.0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("left ")[2] for line in lines] == ["12 s", "9 s"]
