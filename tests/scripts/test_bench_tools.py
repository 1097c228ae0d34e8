"""What benchmarks share: goals, JSON, memory, and that nothing is timed before results agree."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fedllm.errors import ConfigError, MissingExtraError
from scripts.benchmarks.agreement import Tolerance, checked_difference, compare, delta_difference
from scripts.benchmarks.memory import peak_memory
from scripts.benchmarks.timing import Timing
from scripts.charts import bars, check_plot, dots, lines, scatter
from scripts.command_line import run_module
from scripts.reports import Goal, Spread, megabytes, report

CPU = torch.device("cpu")
LOOSE = Tolerance(1.0, 1e-3)


def test_a_goal_is_reached_from_below_or_kept_from_above() -> None:
    assert [Goal(value, 1.0).met for value in (0.9, 1.0, 1.1)] == [False, True, True]
    assert [Goal(value, 1.0, at_most=True).met for value in (0.9, 1.0, 1.1)] == [True, True, False]
    assert not Goal(float("nan"), 1.0, at_most=True).met


def test_a_report_has_the_same_form_for_both_kinds_of_goals() -> None:
    goals = {"more": Goal(2.0, 1.0), "less": Goal(2.0, 1.0, at_most=True)}
    assert report("x", {"spread": Spread(1.0, 2.0, 3.123456)}, goals) == {
        "name": "x",
        "figures": {"spread": {"min": 1.0, "median": 2.0, "max": 3.1235}},
        "goals": {
            "more": {"value": 2.0, "goal": 1.0, "met": True},
            "less": {"value": 2.0, "goal": 1.0, "met": False},
        },
    }


def test_the_clock_counts_where_a_gpu_computes() -> None:
    timing = Timing(cpu=3.0, wall=5.0)
    assert timing.busy(CPU) == 3.0
    assert timing.busy(torch.device("cuda")) == 5.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak memory")
def test_peak_memory_is_what_work_needed_at_once_whatever_it_gave_back() -> None:
    def in_turn() -> int:
        return sum(len(torch.ones(4 * 2**20)) for _ in range(3))  # 16 MiB, three times

    def together() -> int:
        return len(torch.cat([torch.ones(4 * 2**20) for _ in range(3)]))  # 48 MiB, and as much again

    for _ in range(2):
        (length, small), (again, large) = (peak_memory(work, CPU) for work in (in_turn, together))
        assert length == again == 12 * 2**20
        if small is None or large is None:
            pytest.skip("this kernel does not let a process reset its peak")
        assert 15 * 2**20 < small < 40 * 2**20
        assert 90 * 2**20 < large < 120 * 2**20


def test_unknown_memory_has_a_sign_of_its_own() -> None:
    assert megabytes(None) == "?"
    assert megabytes(2_600_000) == "3"


BENCHMARKS = {"fused": "one", "wire": "another"}


def test_command_of_a_benchmark_takes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module("scripts.benchmarks", BENCHMARKS, ["wire", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(option in told for option in ("--quick", "--json", "--steps", "--plot"))


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module("scripts.benchmarks", BENCHMARKS, ["speed"]) == 2
    assert "speed" in capsys.readouterr().err


def test_option_that_cannot_be_met_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["wire", "--quick", "--model", str(tmp_path / "nowhere")]
    assert run_module("scripts.benchmarks", BENCHMARKS, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedllm: ")
    assert "nowhere" in line


def test_a_difference_is_relative_to_the_largest_movement_of_the_worst_client() -> None:
    expected = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    found = expected + torch.tensor([[0.0, 0.2, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]])
    assert delta_difference(found, expected, 1.0) == pytest.approx(0.2)
    assert delta_difference(found, expected, 0.5) == 0.0


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_variants_that_differ_are_never_timed(value: float) -> None:
    calls: list[str] = []

    def work(name: str, values: float) -> torch.Tensor:
        calls.append(name)
        return torch.tensor([[1.0, values]])

    with pytest.raises(RuntimeError, match="b trained another adapter"):
        compare({"a": lambda: work("a", 1.0), "b": lambda: work("b", value)}, CPU, 5, LOOSE)
    assert calls == ["a", "b"]


def test_variants_are_compared_again_in_every_repetition() -> None:
    values = iter([1.0, 1.0, 1.1])
    steady = torch.tensor([[1.0, 1.0]])
    with pytest.raises(RuntimeError, match="another adapter"):
        compare({"a": lambda: steady, "b": lambda: steady * next(values)}, CPU, 5, LOOSE)
    assert list(values) == []


def test_what_stands_apart_is_timed_and_not_compared() -> None:
    steady = torch.tensor([[1.0, 1.0]])
    compared = compare(
        {"a": lambda: steady, "b": lambda: steady + 1e-4}, CPU, 3, LOOSE, apart={"other": lambda: -steady}
    )
    assert {name: len(timings) for name, timings in compared.timings.items()} == {"other": 3, "a": 3, "b": 3}
    assert compared.difference == pytest.approx(1e-4, rel=1e-2)
    assert compared.ratio("a", "a") == Spread(1.0, 1.0, 1.0)
    assert set(compared.figures("other")) == {"cpu_s", "wall_s", "peak_bytes"}


def test_one_variant_alone_agrees_with_itself() -> None:
    assert checked_difference({"a": torch.ones(1, 3)}, LOOSE) == 0.0


def test_plots_show_names_and_are_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [(1.0, Spread(0.9, 1.0, 1.3)), (8.0, Spread(1.9, 2.0, 2.1))]
    for name in ("a.svg", "b.svg"):
        lines(tmp_path / name, "A title", "clients", "ratio", {"tiny": points}, log_x=True, reference=1.0)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert all(f">{word}<" in text for word in ("A title", "clients", "ratio", "tiny", "8"))


def test_bars_may_be_missing_from_a_group(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = Spread(1.0, 2.0, 3.0)
    bars(tmp_path / "new" / "a.svg", "Bars", "s", {"left": {"x": one, "y": one}, "right": {"y": one}})
    text = (tmp_path / "new" / "a.svg").read_text()
    assert all(f">{word}<" in text for word in ("Bars", "left", "right", "x", "y"))
    bars(tmp_path / "a.png", "Bars", "s", {"left": {"x": one}})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_dots_and_points_have_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = Spread(1.0, 2.0, 3.0)
    dots(tmp_path / "dots.svg", "Dots", "loss", {"low": {"mean": one}, "high": {"mean": one, "worst": one}})
    scatter(tmp_path / "points.svg", "Points", "rho", "gap", {"near": [(0.1, 0.2), (0.3, 0.1)]}, reference=0.0)
    dotted, scattered = ((tmp_path / name).read_text() for name in ("dots.svg", "points.svg"))
    assert all(f">{word}<" in dotted for word in ("Dots", "loss", "low", "high", "mean", "worst"))
    assert all(f">{word}<" in scattered for word in ("Points", "rho", "gap", "near"))


def test_plot_of_an_unknown_kind_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--plot 'figure\.gif'"):
        check_plot(Path("figure.gif"))


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fedllm\[bench\]'"):
        check_plot(Path("figure.svg"))
    with pytest.raises(MissingExtraError, match=r"pip install 'fedllm\[bench\]'"):
        lines(tmp_path / "a.svg", "t", "x", "y", {})
