"""Plots of the studies; matplotlib comes with the extra `bench` and is imported when a plot is drawn."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.errors import MissingExtraError
from scripts.experiments.cells import Figures

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")  # Okabe and Ito
_MARKERS = ("o", "s", "^", "D", "v", "P")


def check_matplotlib() -> None:
    """Return where plots can be drawn.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plots need matplotlib: pip install 'fedllm[bench]', or leave out --plot")


def rho_scatter(figures: Figures, path: Path) -> None:
    """Draw gap over rho, one point per pair of runs: colour by local steps, marker by skew."""
    points = [point for point in figures["points"] if "gap" in point]
    figure, axes = _figure()
    steps, skews = _values(points, "steps"), _values(points, "skew")
    for colour, step in enumerate(steps):
        for marker, skew in enumerate(skews):
            chosen = [point for point in points if (point["steps"], point["skew"]) == (step, skew)]
            axes.scatter(
                [point["rho"] for point in chosen],
                [point["gap"] for point in chosen],
                color=_COLOURS[colour % len(_COLOURS)],
                marker=_MARKERS[marker % len(_MARKERS)],
                label=f"{step} local steps, {skew}",
            )
    axes.axhline(0.0, color="0.6", linewidth=1)
    axes.set_xlabel("rho: error of averaging factors / change of the round")
    axes.set_ylabel("gap: held-out loss, factor mean - svd (nats)")
    axes.set_title("What averaging factors costs")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def rho_lines(figures: Figures, path: Path) -> None:
    """Draw rho over local steps, one line per number of clients, learning rate and skew; mean over seeds."""
    points = [point for point in figures["points"] if "gap" in point]
    figure, axes = _figure()
    steps, clients = _values(points, "steps"), _values(points, "clients")
    kinds = sorted({(point["skew"], point["rate"]) for point in points})
    styles = dict(zip(kinds, ("-", "--", ":", "-.") * len(kinds), strict=False))
    for colour, number in enumerate(clients):
        for (skew, rate), style in styles.items():
            means = [
                _mean(
                    [
                        p["rho"]
                        for p in points
                        if (p["clients"], p["skew"], p["rate"], p["steps"]) == (number, skew, rate, step)
                    ]
                )
                for step in steps
            ]
            axes.plot(
                steps,
                means,
                style,
                marker="o",
                markersize=4,
                color=_COLOURS[colour % len(_COLOURS)],
                label=f"{number} clients, {skew}, rate {rate:g}",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("local steps of a round")
    axes.set_ylabel("rho")
    axes.set_title("The error of averaging factors")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    _save(figure, path)


def method_dots(figures: Figures, part: str, path: Path) -> None:
    """Draw the mean and the worst client's loss of every method of one part, with standard deviations."""
    rows = {name: row for name, row in figures["tables"][part].items() if "mean_after" in row}
    names = sorted(rows, key=lambda name: -rows[name]["mean_after"]["mean"])
    figure, axes = _figure()
    for colour, (key, label) in enumerate((("mean_after", "mean client"), ("worst_after", "worst client"))):
        axes.errorbar(
            [rows[name][key]["mean"] for name in names],
            range(len(names)),
            xerr=[rows[name][key]["sd"] for name in names],
            fmt=_MARKERS[colour],
            color=_COLOURS[colour],
            capsize=3,
            label=label,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("held-out loss after the run (nats per token)")
    axes.set_title(f"Methods, clients by {part}")
    axes.legend(frameon=False)
    _save(figure, path)


def dots(groups: Mapping[str, Mapping[str, Figures]], path: Path, label: str) -> None:
    """Draw means with standard deviations, one line per group and one colour per name in it."""
    figure, axes = _figure()
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    for colour, name in enumerate(names):
        places = [place for place, group in enumerate(groups.values()) if name in group]
        found = [group[name] for group in groups.values() if name in group]
        axes.errorbar(
            [one["mean"] for one in found],
            [place + 0.12 * (colour - len(names) / 2) for place in places],
            xerr=[one["sd"] for one in found],
            fmt=_MARKERS[colour % len(_MARKERS)],
            color=_COLOURS[colour % len(_COLOURS)],
            capsize=3,
            label=name,
        )
    axes.axvline(0.0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_xlabel(label)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def levels(
    series: Mapping[str, Mapping[str, Figures]],
    path: Path,
    *,
    title: str,
    label: str,
    reference: tuple[str, float],
) -> None:
    """Draw means with standard deviations over named levels, one line per series, and a level line."""
    figure, axes = _figure()
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    for place, (series_name, values) in enumerate(series.items()):
        axes.errorbar(
            [names.index(name) for name in values],
            [one["mean"] for one in values.values()],
            yerr=[one["sd"] for one in values.values()],
            marker=_MARKERS[place % len(_MARKERS)],
            color=_COLOURS[place % len(_COLOURS)],
            capsize=3,
            label=series_name,
        )
    axes.axhline(reference[1], color="0.6", linewidth=1, linestyle=":", label=reference[0])
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _values(points: Sequence[Figures], name: str) -> list[Any]:
    return sorted({point[name] for point in points})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "fedllm", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
