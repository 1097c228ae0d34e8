"""Charts show their names, are the same every time, and are refused in time."""

import importlib.util
from pathlib import Path

import pytest

from fedllm.errors import ConfigError, MissingExtraError
from scripts.charts import bars, check_plot, dots, lines, scatter
from scripts.reports import Spread

pytestmark = pytest.mark.research


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
    scatter(
        tmp_path / "points.svg", "Points", "rho", "gap", {"near": [(0.1, 0.2), (0.3, 0.1)]}, reference=0.0
    )
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
