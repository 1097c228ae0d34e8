"""The figures of the studies as tables for a person."""

from collections.abc import Callable, Iterator, Mapping

from rich.table import Table

from scripts.experiments.cells import Figures
from scripts.reports import figures_table

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
