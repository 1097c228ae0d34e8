"""What a terminal shows of a run: lines that fit, a bar for every phase, the time that is left."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import rich.console
from rich.cells import cell_len

from fedllm.config.run_config import RunConfig
from fedllm.messages import ClientFailure
from fedllm.plan.run_plan import RunPlan, resolve
from fedllm.runs.records import DistillationRecord, RoundRecord, TrainingRecord
from scripts.console import Console
from scripts.run_view import RunView, figures_of, fitting, seconds_left

LARGE: dict[str, Any] = {
    "federation.num-clients": 1000,
    "federation.num-rounds": 1000,
    "distill.when": "every",
    "privacy.epsilon": 8.0,
}


def plan_of(**flat: Any) -> RunPlan:
    return resolve(RunConfig.from_flat(flat))


@pytest.fixture
def view() -> Callable[..., tuple[RunView, io.StringIO]]:
    """Return a function (width, **keys) -> a view on a terminal so wide, and what it prints."""

    def make(width: int, **flat: Any) -> tuple[RunView, io.StringIO]:
        console, printed = Console(), io.StringIO()
        console.rich = rich.console.Console(
            file=printed, force_terminal=True, width=width, highlight=False, markup=False, color_system=None
        )
        return RunView(console, plan_of(**flat)), printed

    return make


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_no_line_of_a_run_is_wider_than_its_terminal(view: Callable, width: int) -> None:
    shown, printed = view(width, **LARGE)
    loss = TrainingRecord(loss=12.3456)
    shown.notice("client 서울중앙병원-내과-3 lost: the node did not answer within 600 s and is left out " * 3)
    for number in range(3):
        names = tuple(f"client-{place:04d}" for place in range(1000))
        shown.record(
            RoundRecord(
                round_num=number,
                training=loss,
                asked=names,
                accepted=names[:990],
                lost=dict.fromkeys(names[990:], "no reply"),
                held_out={"a": 10.5},
                bytes_up=123_456_789,
                bytes_down=987_654_321,
                seconds=12345.6,
            )
        )
    lines = printed.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert sum("12.346" in line for line in lines) == 3
    assert ["990/1000" in line for line in lines if "12.346" in line] == [False, True, True]


@pytest.mark.parametrize("width", [60, 80])
def test_the_bar_fits_and_says_what_is_being_done(view: Callable, width: int) -> None:
    shown, printed = view(width, **{"federation.num-rounds": 3})
    with shown.showing():
        for phase in (("joining", 0, 8), ("evaluating", 0, 8), ("evaluating", 8, 8)):
            shown.phase(*phase)
            shown.progress.refresh()
        shown.record(RoundRecord(round_num=0, seconds=2.0))
        shown.phase("training", 0, 4)
        for name in "ab":
            shown.client(1, ClientFailure(client_id=name, code="lost", reason="no reply"))
        shown.progress.refresh()
        shown.phase("distilling", 0, 0)
        shown.progress.refresh()
    frames = [line for part in printed.getvalue().split("\r") for line in part.splitlines()]
    frames = [frame.replace("\x1b[2K", "").replace("\x1b[?25l", "") for frame in frames]
    assert max(map(cell_len, frames)) <= width
    text = "\n".join(frames)
    for words in ("joining", "0/8", "evaluating", "8/8", "round 1/3 training", "2/4", "round 1/3 distilling"):
        assert words in text


def test_columns_that_matter_least_go_first() -> None:
    figures = figures_of(plan_of(**{"distill.when": "last"}))
    names = {width: {figure.name for figure in fitting(figures, width)} for width in (200, 80, 60, 10)}
    assert len(names[200]) == len(figures)
    assert names[10] == {"round", "train loss", "held-out", "clients"}
    assert names[10] < names[60] < names[80] < names[200]


@pytest.mark.parametrize("flat", [{}, {"distill.when": "last"}, {"privacy.epsilon": 1.0}])
def test_figures_of_unused_techniques_are_left_out(flat: dict[str, Any]) -> None:
    names = {figure.name for figure in figures_of(plan_of(**flat))}
    assert ("distilled" in names, "epsilon" in names) == ("distill.when" in flat, "privacy.epsilon" in flat)


def done(number: int, seconds: float, **changes: Any) -> RoundRecord:
    """Return the record of a round that trained on 100 tokens."""
    return RoundRecord(round_num=number, seconds=seconds, training=TrainingRecord(num_tokens=100), **changes)


def test_time_left_counts_the_evaluation_to_come() -> None:
    plan = plan_of(**{"federation.num-rounds": 4})
    records = [done(0, 5.0), done(1, 2.0), done(2, 2.0)]
    assert seconds_left(plan, records[:1]) is None
    assert seconds_left(plan, records) == pytest.approx(2 * 2.0 + 5.0)
    assert seconds_left(plan, [*records, done(3, 2.0), done(4, 7.0, held_out={"a": 1.0})]) == 0.0


def test_time_left_counts_distillation_before_its_first_step() -> None:
    plain = {"federation.num-rounds": 4, "data.held-out-fraction": 0.0}
    records = [done(0, 0.0), done(1, 2.0)]
    without, last, every = (
        seconds_left(plan_of(**plain, **{"distill.when": when}), records)
        for when in ("never", "last", "every")
    )
    assert without is not None
    assert last is not None
    assert every is not None
    assert without == 6.0
    assert every - without == pytest.approx(3 * (last - without))
    assert last > without


def test_time_left_takes_a_distillation_step_as_long_as_the_last() -> None:
    flat = {"federation.num-rounds": 3, "distill.when": "every", "distill.gate": "public"}
    step = DistillationRecord(kept=False, reason="", seconds=30.0)
    records = [done(0, 4.0), *(done(number, 33.0, distillation=step) for number in (1, 2))]
    assert seconds_left(plan_of(**flat), records) == pytest.approx(33.0 + 4.0)


def test_a_round_that_failed_says_nothing_of_the_time() -> None:
    plan = plan_of(**{"federation.num-rounds": 3})
    assert seconds_left(plan, [done(0, 0.0), done(1, 600.0, applied=False)]) is None


def test_clients_lost_in_a_round_are_bounded_lines(view: Callable) -> None:
    shown, printed = view(80)
    for round_num in (1, 2):
        for number in range(500):
            shown.client(round_num, ClientFailure(client_id=f"client-{number}", code="bad-data"))
        shown.record(RoundRecord(round_num=round_num, applied=False))
    assert printed.getvalue().count("lost: bad-data") == 40
    assert printed.getvalue().count("480 more clients lost") == 2
