"""Tables and summaries fit the terminal, and say where a run's results lie."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import rich.console
from rich.cells import cell_len

from scripts.console import MOST_CLIENTS, Console, in_time, loss_table, one_line


@pytest.fixture
def console() -> Callable[[int], tuple[Console, io.StringIO]]:
    """Return a function (width) -> a console on a terminal so wide, and what it prints."""

    def make(width: int) -> tuple[Console, io.StringIO]:
        made, printed = Console(), io.StringIO()
        made.rich = rich.console.Console(file=printed, force_terminal=True, width=width, color_system=None)
        return made, printed

    return make


@pytest.mark.parametrize("width", [60, 80])
def test_a_table_of_losses_fits_with_long_names(console: Callable, width: int) -> None:
    made, printed = console(width)
    losses = {f"{'아주-긴-이름' * 9}-{number}": 10.0 + number for number in range(3)}
    made.rich.print(loss_table({"base": losses, "adapter": losses, "+ personal": losses}))
    lines = printed.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) == 1 + 3 + 4
    assert "11.000" in lines[2]


def test_a_table_of_many_clients_lists_the_worst() -> None:
    losses = {f"client-{number}": float(number) for number in range(100)}
    table = loss_table({"base": dict.fromkeys(losses, 1.0), "adapter": losses})
    names = list(table.columns[0].cells)
    assert names[:2] == ["client-80", "client-81"]
    assert names[MOST_CLIENTS] == f"and {100 - MOST_CLIENTS} with lower losses"
    assert len(names) == MOST_CLIENTS + 1 + 4


@pytest.mark.parametrize("width", [60, 80])
def test_a_summary_fits_and_says_what_to_type(
    console: Callable, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made, printed = console(width)
    answers = {"prompts": ["가" * 200], "before": ["word " * 99], "after": [""]}
    made.summary(
        tmp_path / "runs" / "r", {"held_out": {}, "rounds": 2, "answers": answers, "stopped": "spent"}
    )
    lines = printed.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert any(line.endswith("fedllm evaluate runs/r") for line in lines)
    assert any("runs/r/adapter" in line for line in lines)
    assert any("round 2" in line and "spent" in line for line in lines)
    assert len(lines) <= 4 + 6


def test_one_line_counts_cells() -> None:
    assert cell_len(one_line("가나다\n라마바사", 8)) <= 8
    assert one_line("a  b\nc") == "a b c"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "60 s"), (100, "2 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_times_are_said_as_people_do(seconds: float, words: str) -> None:
    assert in_time(seconds) == words
