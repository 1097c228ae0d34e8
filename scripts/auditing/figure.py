"""The plot of an audit: ROC curves, and every attack beside its controls. matplotlib comes with `bench`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORMATS = (".png", ".svg", ".pdf")
_COLOURS = {"run": "#0072b2", "positive_control": "#d55e00", "held_out": "#999999"}  # Okabe and Ito
_NAMES = {"run": "this run", "positive_control": "positive control", "held_out": "held-out control"}


def draw(report: Mapping[str, Any], curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw ROC curves with logarithmic axes (arXiv 2112.03570) and the numbers of `report` as bars."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_curves(left, report, curves)
    _draw_bars(right, report)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8, loc="upper center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_curves(
    axes: Any, report: Mapping[str, Any], curves: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    lowest = 0.5 / max(1, report["num_others"], report["num_members"])
    for name, points in curves.items():
        alarms, caught = zip(*points, strict=True)
        steps = {"drawstyle": "steps-post", "color": _COLOURS[name], "label": _NAMES[name]}
        axes.plot([max(lowest, x) for x in alarms], [max(lowest, y) for y in caught], **steps)
    axes.plot([lowest, 1], [lowest, 1], color="0.6", linewidth=1, linestyle=":", label="guessing")
    axes.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.05))
    axes.set_xlabel("held-out rows taken for members")
    axes.set_ylabel("members found")
    axes.set_title("Membership by the loss ratio to the base")


def _draw_bars(axes: Any, report: Mapping[str, Any]) -> None:
    groups = bars_of(report)
    for place, kind in enumerate(_COLOURS):
        heights = [group.get(kind) or 0.0 for group in groups.values()]
        spots = [number + (place - 1) * 0.27 for number in range(len(groups))]
        axes.bar(spots, heights, width=0.25, color=_COLOURS[kind], label=_NAMES[kind])
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylim(0, 1.15)
    axes.set_title("Attacks and their controls")


def bars_of(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers from 0 to 1 that are drawn as bars; an attack that was skipped has none."""
    ratio, taken = report["membership"]["loss-ratio"], report["extraction"]
    groups = {
        "AUC": {kind: ratio[kind]["area"] for kind in _COLOURS if ratio[kind]},
        "found at\n1 % FPR": {kind: ratio[kind]["caught"] for kind in _COLOURS if ratio[kind]},
        "extracted": {kind: taken[kind]["rate"] for kind in _COLOURS},
    }
    inversion = report["inversion"]
    if "skipped" not in inversion:
        groups["tokens\nread (F1)"] = {
            "run": inversion["run"]["update"]["closest"]["f1"],
            "held_out": inversion["held_out"]["update"]["closest"]["f1"],
            "positive_control": inversion["positive_control"]["closest"]["f1"],
        }
    canaries = report["canaries"]
    if "skipped" not in canaries:
        first, control = next(iter(canaries["repeats"].values())), canaries["positive_control"]
        groups["canaries\nguessed"] = {
            "run": _right(first["run"]),
            "held_out": _right(first["base"]),
            "positive_control": _right(control) if control else 0.0,
        }
    return groups


def _right(measured: Mapping[str, Any]) -> float:
    return float(measured["num_right"] / max(1, measured["num_guessed"]))
