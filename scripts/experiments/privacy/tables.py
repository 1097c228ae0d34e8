"""The figures of the privacy experiment: rows over seeds, goals, the table and the plot."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from fedllm.config.key import Scalar
from scripts.charts import lines
from scripts.reports import Goal, Spread, figures_table, mean_and_sd, mean_spread
from scripts.studies.trials import Figures, Outcome

# Epsilon of no privacy, of noise too small to matter (clipping alone), and in place of one the control of
# the attack: one client's rows learnt by heart.
NONE, CLIPPED, BY_HEART = 0.0, 1e6, -1.0
UNBUDGETED = (NONE, BY_HEART)


def rows_of(outcomes: Sequence[Outcome]) -> list[Figures]:
    """Return one row per preset and epsilon: means and standard deviations over the seeds.

    `kept` is the share of the gain of the same preset and seed without privacy, (before - after) over that.
    """
    done = [outcome for outcome in outcomes if outcome.is_done]
    open_gains = {
        (o.trial.labels["preset"], o.trial.labels["seed"]): _gain(o)
        for o in done
        if o.trial.labels["epsilon"] == NONE
    }
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in done:
        labels = outcome.trial.labels
        groups.setdefault((str(labels["preset"]), float(labels["epsilon"])), []).append(outcome)
    return [_row(preset, epsilon, group, open_gains) for (preset, epsilon), group in groups.items()]


def _gain(outcome: Outcome) -> float:
    return float(outcome.figures["mean_before"] - outcome.figures["mean_after"])


def _row(
    preset: str, epsilon: float, group: Sequence[Outcome], open_gains: Mapping[tuple[Scalar, Scalar], float]
) -> Figures:
    figures = [outcome.figures for outcome in group]
    labels = group[0].trial.labels
    row: Figures = {
        "preset": preset,
        "budget": epsilon,
        "seeds": len(group),
        "rate": labels["rate"],
        "clip": labels["clip"],
        **{
            name: mean_and_sd([one[name] for one in figures])
            for name in ("mean_after", "worst_after")
            if epsilon != BY_HEART
        },
    }
    kept = [
        _gain(outcome) / open_gains[preset, outcome.trial.labels["seed"]]
        for outcome in group
        if epsilon != BY_HEART and open_gains.get((preset, outcome.trial.labels["seed"]), 0.0) > 0
    ]
    if kept:
        row["kept"] = mean_and_sd(kept)
    if epsilon not in UNBUDGETED:
        row["epsilon"] = max(one["privacy"]["epsilon"] for one in figures)
        row["noise_multiplier"] = max(one["privacy"]["noise_multiplier"] for one in figures)
    attacks = [one["membership"] for one in figures if one.get("membership")]
    if attacks:
        row |= {name: mean_and_sd([one[name] for one in attacks]) for name in ("area", "caught", "base")}
        row["null_deviation"] = max(one["null_deviation"] for one in attacks)
        row["attacks"] = attacks
    return row


def base_of(outcomes: Sequence[Outcome]) -> Figures:
    """Return the loss of the base model, one value a seed."""
    by_seed = {
        o.trial.labels["seed"]: o.figures
        for o in outcomes
        if o.is_done and o.trial.labels["epsilon"] != BY_HEART
    }
    if not by_seed:
        return {}
    figures = list(by_seed.values())
    return {
        "mean_after": mean_and_sd([one["mean_before"] for one in figures]),
        "worst_after": mean_and_sd([max(one["before"].values()) for one in figures]),
    }


def goals_of(parts: Mapping[str, Figures]) -> dict[str, Goal]:
    """Return the goals: no ledger above its budget, and no private adapter that tells more than the open one.

    The latter is judged by the difference of two mean areas, each with an error of its own: it may exceed
    zero by two standard deviations of such a difference where there is no signal (`null_deviation`, which is
    an upper bound here, as both look at the same held-out rows).
    """
    rows = [row for figures in parts.values() for row in figures["rows"]]
    over = [row["epsilon"] / row["budget"] for row in rows if "epsilon" in row]
    goals = {"epsilon_spent_over_budget": Goal(max(over, default=math.nan), 1.0, at_most=True)}
    for name, figures in parts.items():
        audited = {(row["preset"], row["budget"]): row for row in figures["rows"] if "area" in row}
        rises = [
            (row["area"]["mean"] - audited[preset, NONE]["area"]["mean"])
            / (2 * math.sqrt(2) * row["null_deviation"] / math.sqrt(row["seeds"]))
            for (preset, budget), row in audited.items()
            if budget not in (*UNBUDGETED, CLIPPED) and (preset, NONE) in audited
        ]
        if rises:
            goals[f"rise_of_auc_by_privacy_over_its_error, {name}"] = Goal(max(rises), 1.0, at_most=True)
    return goals


_COLUMNS = ("mean loss", "worst client", "kept", "spent", "noise", "AUC", "TPR")


def privacy_tables(parts: Mapping[str, Figures]) -> Iterator[Table]:
    """Yield one table per part: a row for the base model and one for every preset and epsilon.

    `kept` is the share of the gain without privacy, `spent` the epsilon of the ledger, TPR at 1 % FPR.
    """
    for name, figures in parts.items():
        rows = {"base model": _base_cells(figures)} if figures["base"] else {}
        for row in figures["rows"]:
            rows[f"{row['preset']}, {condition(row['budget'])}"] = _cells(row)
        yield figures_table(f"{name}: held-out loss and membership, mean and sd over seeds", _COLUMNS, rows)


def _base_cells(figures: Figures) -> list[str]:
    losses = [_spread(figures["base"][key]) for key in ("mean_after", "worst_after")]
    areas = [row["base"]["mean"] for row in figures["rows"] if "base" in row and row["budget"] != BY_HEART]
    return [*losses, "-", "-", "-", f"{statistics.fmean(areas):.3f}" if areas else "-", "-"]


def _cells(row: Figures) -> list[str]:
    return [
        *(_spread(row[name]) if name in row else "-" for name in ("mean_after", "worst_after")),
        f"{row['kept']['mean']:.0%}" if "kept" in row else "-",
        f"{row['epsilon']:.3f}" if row.get("epsilon", CLIPPED) < CLIPPED / 2 else "-",
        f"{row['noise_multiplier']:.3f}" if "noise_multiplier" in row else "-",
        f"{row['area']['mean']:.3f}" if "area" in row else "-",
        f"{row['caught']['mean']:.1%}" if "caught" in row else "-",
    ]


def condition(budget: float) -> str:
    """Return an epsilon in words."""
    named = {NONE: "no privacy", CLIPPED: "clipped alone", BY_HEART: "by heart"}
    return named.get(budget, f"epsilon {budget:g}")


def draw_utility(figures: Figures, title: str, path: Path) -> None:
    """Draw the held-out loss over epsilon, one line per preset, with the base model's loss."""
    rows = [row for row in figures["rows"] if row["budget"] not in (CLIPPED, BY_HEART)]
    series: dict[str, list[tuple[float | str, Spread]]] = {}
    for row in sorted(rows, key=lambda one: one["budget"] or math.inf):
        point = (condition(row["budget"]), mean_spread(row["mean_after"]))
        series.setdefault(row["preset"], []).append(point)
    lines(
        *(path, title, "", "held-out loss (nats per token)", series),
        reference=figures["base"]["mean_after"]["mean"],
        reference_name="base model",
        from_zero=False,
    )


def _spread(value: Figures) -> str:
    return f"{value['mean']:.3f} ±{value['sd']:.3f}"
