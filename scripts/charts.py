"""Every chart of this project: lines, bars, dots, points, and the two panels of an audit.

matplotlib comes with the extra `bench` and is imported when a chart is drawn. Drawing opens no window, and
the same figures give the same SVG file. Values are `Spread`s: a mark at the median, a bar from the least to
the most.
"""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.errors import ConfigError, MissingExtraError
from scripts.reports import Spread

FORMATS = (".svg", ".png", ".pdf")
COLOURS = ("#0072b2", "#d55e00", "#999999", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D")


def check_plot(path: Path | None) -> Path | None:
    """Return the file that --plot names, or refuse it before minutes of work for it.

    Raises:
        ConfigError: the name has another ending.
        MissingExtraError: matplotlib is absent.
    """
    if path is not None and path.suffix not in FORMATS:
        raise ConfigError(f"--plot {str(path)!r} should end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if path is not None:
        check_matplotlib()
    return path


def check_matplotlib() -> None:
    """Return where charts can be drawn.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plots need matplotlib: pip install 'fedllm[bench]', or leave out --plot")


Plot = Annotated[
    Path | None, typer.Option(callback=check_plot, help="Draw the figures to this .svg, .png or .pdf file.")
]


def lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float | str, Spread]]],
    *,
    log_x: bool = False,
    reference: float | None = None,
    reference_name: str = "",
    from_zero: bool = True,
) -> None:
    """Draw one line per name through its (x, spread) points; an x that is text is a place of its own.

    `log_x` puts powers of two at equal distances; `reference` is a dashed horizontal line, a goal say.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    figure, axes = _figure(title, x_label, y_label)
    for name, points in series.items():
        spreads = [spread for _, spread in points]
        values, reach = _values(spreads), _reach(spreads)
        axes.errorbar([x for x, _ in points], values, yerr=reach, label=name, markersize=4, capsize=3)
    if log_x:
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    if reference is not None:
        axes.axhline(reference, color="0.5", linestyle="--", linewidth=1, label=reference_name or None)
    if from_zero:
        axes.set_ylim(bottom=0)
    _save(figure, path)


def bars(
    path: Path,
    title: str,
    y_label: str,
    groups: Mapping[str, Mapping[str, Spread]],
    *,
    reference: float | None = None,
) -> None:
    """Draw one group of bars per name, one bar per inner name; groups may lack a bar.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    figure, axes = _figure(title, "", y_label)
    _draw_bars(axes, groups)
    if reference is not None:
        axes.axhline(reference, color="0.5", linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    _save(figure, path)


def dots(
    path: Path,
    title: str,
    x_label: str,
    groups: Mapping[str, Mapping[str, Spread]],
    *,
    reference: float | None = None,
) -> None:
    """Draw one row of dots per name, from the bottom up, one colour per inner name.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    figure, axes = _figure(title, x_label, "")
    names = _inner_names(groups)
    for number, name in enumerate(names):
        held = [(place, group[name]) for place, group in enumerate(groups.values()) if name in group]
        spreads = [spread for _, spread in held]
        rows = [place + 0.12 * (number - (len(names) - 1) / 2) for place, _ in held]
        axes.errorbar(_values(spreads), rows, xerr=_reach(spreads), linestyle="none", label=name, capsize=3)
    if reference is not None:
        axes.axvline(reference, color="0.6", linewidth=1)
    axes.set_yticks(range(len(groups)), list(groups))
    _save(figure, path)


def scatter(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    reference: float | None = None,
) -> None:
    """Draw the (x, y) points of every name in a colour and marker of its own.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    figure, axes = _figure(title, x_label, y_label)
    for name, pairs in points.items():
        axes.plot([x for x, _ in pairs], [y for _, y in pairs], linestyle="none", label=name)
    if reference is not None:
        axes.axhline(reference, color="0.6", linewidth=1)
    _save(figure, path)


def roc_and_bars(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    groups: Mapping[str, Mapping[str, Spread]],
    *,
    lowest: float,
) -> None:
    """Draw ROC curves with logarithmic axes from `lowest` (arXiv 2112.03570), next to bars from 0 to 1.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    figure, left = _figure(
        "Membership by the loss ratio to the base",
        *("held-out rows taken for members", "members found"),
        panels=2,
    )
    right = figure.axes[1]
    colours = dict(zip(_inner_names([curves, *groups.values()]), COLOURS, strict=False))
    for name, points in curves.items():
        alarms, caught = ([max(lowest, value) for value in values] for values in zip(*points, strict=True))
        left.plot(alarms, caught, drawstyle="steps-post", color=colours[name], marker="", label=name)
    left.plot([lowest, 1], [lowest, 1], color="0.6", linewidth=1, linestyle=":", marker="", label="guessing")
    left.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.05))
    _draw_bars(right, groups, colours)
    right.set_ylim(0, 1.15)
    right.set_title("Attacks and their controls")
    _save(figure, path)


def _draw_bars(
    axes: Any, groups: Mapping[str, Mapping[str, Spread]], colours: Mapping[str, str] | None = None
) -> None:
    names = _inner_names(groups.values())
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        held = [(place, group[name]) for place, group in enumerate(groups.values()) if name in group]
        spreads = [spread for _, spread in held]
        places = [place + (number - (len(names) - 1) / 2) * width for place, _ in held]
        reach = _reach(spreads)
        axes.bar(
            places,
            _values(spreads),
            width,
            yerr=reach if any(map(any, reach)) else None,
            label=name,
            capsize=3,
            color=(colours or {}).get(name, COLOURS[number % len(COLOURS)]),
        )
    axes.set_xticks(range(len(groups)), list(groups))


def _inner_names(groups: Mapping[str, Iterable[str]] | Iterable[Iterable[str]]) -> list[str]:
    """Return the names within all groups, each once, so that one name has one colour everywhere."""
    inner = groups.values() if isinstance(groups, Mapping) else groups
    return list(dict.fromkeys(name for group in inner for name in group))


def _figure(title: str, x_label: str, y_label: str, panels: int = 1) -> tuple[Any, Any]:
    """Return a figure in the style of all charts, and the axes of its first panel."""
    check_matplotlib()
    from matplotlib import cycler
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(3 + 4 * panels, 4.3), layout="constrained")
    for axes in figure.subplots(1, panels, squeeze=False)[0]:
        axes.set_prop_cycle(cycler(marker=MARKERS) * cycler(color=COLOURS))
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_title(title)
    first.set_xlabel(x_label)
    first.set_ylabel(y_label)
    return figure, first


def _values(spreads: Sequence[Spread]) -> list[float]:
    return [spread.median for spread in spreads]


def _reach(spreads: Sequence[Spread]) -> list[list[float]]:
    """Return how far below and above the median each figure went, as matplotlib takes error bars."""
    below = [spread.median - spread.min for spread in spreads]
    return [below, [spread.max - spread.median for spread in spreads]]


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    for axes in figure.axes:
        # Next to the axes, where no line can run through it.
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    with matplotlib.rc_context({"svg.hashsalt": "fedllm", "svg.fonttype": "none"}):
        figure.savefig(path, metadata=undated, dpi=150)
