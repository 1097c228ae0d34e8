"""Plots of benchmark figures; matplotlib comes with the extra `bench`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.bench_tools import Spread


def lines(
    path: Path, title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, Spread]]]
) -> None:
    """Write one line a series to `path`: medians, with bars from min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for name, points in series.items():
        middles = [spread.median for _, spread in points]
        below = [spread.median - spread.min for _, spread in points]
        above = [spread.max - spread.median for _, spread in points]
        axes.errorbar([x for x, _ in points], middles, yerr=[below, above], label=name, marker="o", capsize=3)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
