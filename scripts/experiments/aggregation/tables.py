"""The figures of the studies as tables and plots for a person."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.table import Table

from scripts.charts import dots, lines, scatter
from scripts.reports import Spread, figures_table, mean_spread
from scripts.studies.trials import Figures

_METHOD_COLUMNS = ("rate", "mean loss", "worst client", "rho", "kept", "kB up", "kB down")


def methods_tables(figures: Figures) -> Iterator[Table]:
    """Yield one table per part of study A."""
    for part, by_method in figures["tables"].items():
        ordered = sorted(by_method.items(), key=lambda item: item[1].get("mean_after", {}).get("mean", 99.0))
        rows = {name: _method_cells(row) for name, row in ordered}
        for name, row in ordered:
            if "union_after" in row:
                loss = _mean_and_sd(row["union_after"])
                rows[f"{name}, on all rows"] = [f"{row['rate']:g}", loss, *"-----"]
        yield figures_table(f"held-out loss, {part}: mean and sd over seeds", _METHOD_COLUMNS, rows)


def _method_cells(row: Figures) -> list[str]:
    if "mean_after" not in row:
        return [f"{row['rate']:g}", "-", "-", "-", "-", "-", "-"]
    return [
        f"{row['rate']:g}",
        _mean_and_sd(row["mean_after"]),
        _mean_and_sd(row["worst_after"]),
        _number(row.get("rho"), ".3f"),
        _number(row.get("kept"), ".3f"),
        _number(row["bytes_up"] / 1e3 if "bytes_up" in row else None, ".1f"),
        _number(row["bytes_down"] / 1e3 if "bytes_down" in row else None, ".1f"),
    ]


def map_table(figures: Figures) -> Table:
    """Return the table of study B: one row per point."""
    rows = {}
    for point in figures["points"]:
        name = ", ".join(
            [
                f"{point['clients']} clients",
                f"{point['steps']} steps",
                f"rate {point['rate']:g}",
                str(point["skew"]),
                f"seed {point['seed']}",
            ]
        )
        rows[name] = [
            _number(point.get(key), ".4f") for key in ("rho", "kept", "loss_factors", "loss_exact", "gap")
        ]
    return figures_table(
        "what averaging factors costs",
        ("rho", "kept", "loss, factor mean", "loss, svd", "gap"),
        rows,
    )


def poison_tables(figures: Figures) -> Iterator[Table]:
    """Yield the tables of study C: loss ratios per skew, then backdoors per skew."""
    for skew, by_attack in figures["tables"].items():
        yield _by_rule(f"honest clients, {skew}: loss / clean loss, gain / clean gain", by_attack, _ratio)
    for skew, by_attack in figures["backdoors"].items():
        if by_attack:
            title = f"backdoors, {skew}: target answered, target preferred, and as above"
            yield _by_rule(title, by_attack, _backdoor)


def draw_methods(figures: Figures, part: str, path: Path) -> None:
    """Draw the mean and the worst client's loss of every method of one part, the best at the top."""
    rows = {name: row for name, row in figures["tables"][part].items() if "mean_after" in row}
    groups = {
        name: {
            label: mean_spread(row[key])
            for key, label in (("mean_after", "mean client"), ("worst_after", "worst client"))
        }
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["mean_after"]["mean"])
    }
    dots(path, f"Methods, clients by {part}", "held-out loss after the run (nats per token)", groups)


def draw_rho(figures: Figures, folder: Path) -> None:
    """Draw gap over rho, one point per pair of runs, and rho over local steps as means over the seeds."""
    points = [point for point in figures["points"] if "gap" in point]
    clouds: dict[str, list[tuple[float, float]]] = {}
    curves: dict[str, dict[float, list[float]]] = {}
    for point in points:
        cloud = f"{point['steps']} local steps, {point['skew']}"
        clouds.setdefault(cloud, []).append((point["rho"], point["gap"]))
        curve = f"{point['clients']} clients, {point['skew']}, rate {point['rate']:g}"
        curves.setdefault(curve, {}).setdefault(point["steps"], []).append(point["rho"])
    scatter(
        folder / "aggregation_rho_gap.svg",
        "What averaging factors costs",
        "rho: error of averaging factors / change of the round",
        "gap: held-out loss, factor mean - svd (nats)",
        dict(sorted(clouds.items())),
        reference=0.0,
    )
    means: dict[str, list[tuple[float | str, Spread]]] = {}
    for name, by_steps in curves.items():
        for steps, found in sorted(by_steps.items()):
            means.setdefault(name, []).append((steps, Spread(*3 * (statistics.fmean(found),))))
    path = folder / "aggregation_rho.svg"
    lines(path, "The error of averaging factors", "local steps of a round", "rho", means, log_x=True)


def _by_rule(
    title: str, by_attack: Mapping[str, Mapping[str, Figures]], cell: Callable[[Figures], str]
) -> Table:
    rules = tuple(dict.fromkeys(rule for by_rule in by_attack.values() for rule in by_rule))
    rows = {
        attack: [cell(by_rule[rule]) if rule in by_rule else "" for rule in rules]
        for attack, by_rule in by_attack.items()
    }
    return figures_table(title, rules, rows)


def _ratio(entry: Figures) -> str:
    if "ratio" in entry:
        return f"{entry['ratio']:.3f} {entry['gain']:.0%}"
    return str(entry.get("reason", "-")).partition(":")[0]


def _backdoor(entry: Figures) -> str:
    if "backdoor" not in entry:
        return _ratio(entry)
    after = entry["backdoor"]["after"]
    return f"{after['answered']:.0%} {after['preferred']:.0%} {_ratio(entry)}"


def _mean_and_sd(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.4f} ±{value['sd']:.4f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
