"""`fedllm privacy`: what noise a budget needs, what a noise costs, and whether anything is left to learn."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from fedllm.adapters.parts import part_size
from fedllm.config.run_config import RunConfig
from fedllm.models.base import describe_layout
from fedllm.plan.privacy import PrivacyPlan
from fedllm.plan.run_plan import resolve
from fedllm.privacy.accounting import Charge, accountant_name, epsilon_of, renyi_check
from fedllm.runs.privacy_statement import summary_line
from scripts.console import Console
from scripts.recipe_arguments import config_of

USUAL_EPSILON = 8.0  # planned for where neither the words nor their recipe name a budget
FACTORS = (0.25, 1, 4, 16)  # of the rounds and of the cohort in the table


def privacy(words: Sequence[str], *, noise: float, rows: int, as_json: bool) -> None:
    """Print the privacy plan of the run that `words` describe, and a table over rounds and cohort sizes.

    `noise` above 0 asks for the epsilon of that noise multiplier; `rows` are a client's, where one row is
    the unit.
    """
    config = config_of(words)
    if config.privacy.epsilon == "off":
        config = config.override({"privacy.epsilon": USUAL_EPSILON})
    plan = resolve(config).privacy
    assert plan is not None
    plan = replace(plan, noise_multiplier=noise or plan.noise_multiplier)
    report = report_of(config, plan, rows)
    if as_json:
        print(json.dumps(report))
    else:
        _print(Console(), plan, report)


def report_of(config: RunConfig, plan: PrivacyPlan, rows: int) -> dict[str, Any]:
    """Return the numbers of a plan: its noise, what it costs, and how the change compares with the noise."""
    charge = plan.charge(rows)
    spent = [replace(charge, count=charge.count * plan.participations)]
    layout = describe_layout(config.model, config.lora)
    num_values = part_size(layout, resolve(config).aggregation.trained_in(1))
    ratio = signal_to_noise(plan, plan.multiplier(rows), full_rounds(config, plan), num_values)
    return {
        "unit": plan.unit,
        "trust": plan.trust,
        "relation": plan.relation,
        "delta": plan.delta,
        "budget": plan.epsilon,
        "epsilon": epsilon_of(spent, plan.delta),
        "epsilon_renyi_check": renyi_check(spent, plan.delta),
        "accountant": accountant_name(spent),
        "noise_multiplier": plan.multiplier(rows),
        "noise_of_all": plan.noise_of_all(round(plan.denominator)) if plan.is_distributed else None,
        "sampling_rate": charge.rate,
        "participations": plan.participations,
        "steps": plan.steps,
        "num_values": num_values,
        "signal_to_noise": ratio,
        "verdict": verdict(plan, ratio),
        "table": table_of(config, plan, rows),
    }


def full_rounds(config: RunConfig, plan: PrivacyPlan) -> int:
    """Return how many rounds of a run have a whole cohort; clients that may not take part again run out."""
    wanted = config.federation.num_rounds
    if not plan.limit:
        return wanted
    return max(1, min(wanted, math.floor(config.federation.num_clients * plan.limit / plan.denominator)))


def signal_to_noise(plan: PrivacyPlan, z: float, rounds: int, num_values: int) -> float:
    """Return the largest change that could be learnt over the noise that is learnt with it, as norms.

    The change of `rounds` rounds is a sum of T releases: one a round, or one a local step where a row is the
    unit. In each, D clients of a round (under coins: on average) move the mean by the clip C at most, all the
    same way, and over T releases by T C. The noise of a release is z C long for every value where the server
    adds it once, sqrt(D) of that where D clients add one each, and in between where they add shares; it is
    divided by D. DP-SGD divides clip and noise by the B rows of a step where they all point one way.
    Independent noises add up to sqrt(T) of one.
    """
    num_releases = rounds * plan.steps
    shared_by = plan.denominator / plan.noise_of_all(round(plan.denominator))
    rows = plan.batch_size if plan.is_by_example else 1
    return math.sqrt(num_releases) * shared_by * rows / (z * math.sqrt(num_values))


def verdict(plan: PrivacyPlan, ratio: float) -> str:
    """Return what to expect of a plan, plainly.

    The ratio compares norms over all values. Learning needs few of their directions, so noise longer than the
    change does not rule it out; ten times as long, or with a handful of clients, nobody has seen a gain.
    """
    compared = f"the noise on the whole run's change is {1 / ratio:.2g} times as long as its largest change"
    if plan.is_by_example:
        advice = "more rows, clients and rounds share it" if ratio < 1 else "that leaves room to learn"
        return f"one row of a client is hidden; {compared}: {advice}"
    if ratio < 0.1 or plan.denominator < 100:
        return (
            f"client-level privacy buys nothing with {plan.denominator:g} clients a round: {compared}, so"
            " expect no gain over the base model; it takes hundreds to thousands of clients a round, or"
            " privacy.unit = 'example', which hides one row of a client"
        )
    return f"a whole client is hidden; {compared}: expect {'little' if ratio < 1 else 'some'} of the gain"


def table_of(config: RunConfig, plan: PrivacyPlan, rows: int) -> list[dict[str, float]]:
    """Return noise and epsilon for several numbers of rounds and cohort sizes.

    Where one row is the unit, the cohort changes nothing: then it is the batch that varies.
    """
    found = []
    size = plan.batch_size if plan.is_by_example else round(plan.denominator)
    most = rows if plan.is_by_example else config.federation.num_clients
    sizes = sorted({min(most, max(1, round(size * factor))) for factor in FACTORS})
    for rounds in sorted({max(1, round(plan.participations * factor)) for factor in FACTORS}):
        for each in sizes:
            rate = each / config.federation.num_clients if plan.rate < 1 else 1.0
            other = replace(plan, participations=rounds, rate=min(1.0, rate), denominator=float(each))
            if plan.is_by_example:
                other = replace(plan, participations=rounds, batch_size=each)
            charge: Charge = other.charge(rows)
            total = [replace(charge, count=charge.count * rounds)]
            found.append(
                {
                    "rounds": rounds,
                    "size": each,
                    "noise_multiplier": other.multiplier(rows),
                    "epsilon": epsilon_of(total, plan.delta),
                }
            )
    return found


def _print(console: Console, plan: PrivacyPlan, report: dict[str, Any]) -> None:
    if plan.noise_multiplier:  # what it costs is the answer, not what the run may spend
        console.line(summary_line(replace(plan, epsilon=float(f"{report['epsilon']:.3g}"))))
        ends = "ends the run before that" if report["epsilon"] > plan.epsilon else "is enough for that"
        console.line(f"the budget, privacy.epsilon = {plan.epsilon:g}, {ends}")
    else:
        console.line(summary_line(plan))
    check = report["epsilon_renyi_check"]
    checked = "" if check is None else f"Renyi check {check:.3g}; "
    console.line(
        f"noise multiplier {report['noise_multiplier']:.3g} -> epsilon {report['epsilon']:.3g}"
        f" ({checked}{report['accountant']});"
        f" {report['participations']} rounds of {report['steps']} releases,"
        f" sampling rate {report['sampling_rate']:.3g}"
    )
    size = "rows a step" if plan.is_by_example else "clients a round"
    table = Table(
        "rounds", size, "noise multiplier", "epsilon", box=None, header_style="bold", pad_edge=False
    )
    for row in report["table"]:
        cells = (f"{row['rounds']:g}", f"{row['size']:g}")
        table.add_row(*cells, f"{row['noise_multiplier']:.3g}", f"{row['epsilon']:.3g}")
    console.rich.print(table)
    console.line(report["verdict"])
