"""Plots of what benchmarks measured: medians, with error bars from the least to the most.

matplotlib comes with the extra `bench` and is imported when a plot is drawn. Drawing opens no window and the
same figures give the same SVG file.
"""

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.errors import MissingExtraError
from scripts.reports import Spread

FORMATS = (".svg", ".png")
INSTALL = "pip install 'fedllm[bench]'"


def plot_file(text: str) -> Path:
    """Return the file that --plot names; a type for argparse, so a bad one ends before anything is measured.

    Raises:
        argparse.ArgumentTypeError: the name does not end in .svg or .png, or matplotlib is absent.
    """
    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} should end in {' or '.join(FORMATS)}")
    if not _has_matplotlib():
        raise argparse.ArgumentTypeError(f"plots need matplotlib: {INSTALL}")
    return path


def lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float, Spread]]],
    *,
    log_x: bool = False,
    reference: float | None = None,
) -> None:
    """Draw one line per name through its (x, spread) points to an SVG or PNG file.

    `log_x` puts powers of two at equal distances; `reference` is a dashed horizontal line, a goal say.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    figure, axes = _figure(title, x_label, y_label, reference)
    for name, points in series.items():
        spreads = [spread for _, spread in points]
        axes.errorbar(
            [x for x, _ in points],
            [spread.median for spread in spreads],
            yerr=_reach(spreads),
            label=name,
            marker="o",
            markersize=4,
            capsize=3,
        )
    if log_x:
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    _save(figure, axes, path)


def bars(
    path: Path,
    title: str,
    y_label: str,
    groups: Mapping[str, Mapping[str, Spread]],
    *,
    reference: float | None = None,
) -> None:
    """Draw one group of bars per name, one bar per inner name, to an SVG or PNG file.

    Groups may lack a bar; inner names are coloured alike everywhere. `reference` as in `lines`.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    figure, axes = _figure(title, "", y_label, reference)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        held = [(place, group[name]) for place, group in enumerate(groups.values()) if name in group]
        spreads = [spread for _, spread in held]
        offset = (number - (len(names) - 1) / 2) * width
        axes.bar(
            [place + offset for place, _ in held],
            [spread.median for spread in spreads],
            width,
            yerr=_reach(spreads),
            label=name,
            capsize=3,
        )
    axes.set_xticks(range(len(groups)), list(groups))
    _save(figure, axes, path)


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _figure(title: str, x_label: str, y_label: str, reference: float | None) -> tuple[Any, Any]:
    if not _has_matplotlib():
        raise MissingExtraError(f"plots need matplotlib: {INSTALL}")
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    if reference is not None:
        axes.axhline(reference, color="0.5", linestyle="--", linewidth=1)
    return figure, axes


def _reach(spreads: Sequence[Spread]) -> list[list[float]]:
    """Return how far below and above the median each figure went, as matplotlib takes error bars."""
    below = [spread.median - spread.min for spread in spreads]
    return [below, [spread.max - spread.median for spread in spreads]]


def _save(figure: Any, axes: Any, path: Path) -> None:
    import matplotlib

    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "fedllm", "svg.fonttype": "none"}):
        figure.savefig(path, metadata=undated, dpi=150)
