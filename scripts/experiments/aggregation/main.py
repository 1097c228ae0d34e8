"""Three studies of aggregation on clients of unlike text, with the product itself, seeded and resumable.

a: every method, its learning rate tuned, compared with local-only, centralised and one-shot training
b: the map of rho, the error of averaging factors, and what that error costs
c: malicious clients, robust rules and backdoors

    python -m scripts.experiments aggregation --quick --json
    python -m scripts.experiments aggregation --data FOLDER --output docs/results/aggregation.json

A finished trial is a line of `trials.jsonl` in the folder --work; started again, a run takes those it needs
and does the rest. The full run takes about half an hour on two idle cores.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from scripts.experiments.aggregation.attacked_runs import attacked
from scripts.experiments.aggregation.methods import DOMAIN, methods_study
from scripts.experiments.aggregation.poison import goals, poison_study
from scripts.experiments.aggregation.rho_map import map_study
from scripts.experiments.aggregation.sizes import FULL, QUICK, SMOLLM2, Size
from scripts.experiments.aggregation.tables import (
    draw_methods,
    draw_rho,
    map_table,
    methods_tables,
    poison_tables,
)
from scripts.experiments.controls import alone, pooled
from scripts.experiments.options import ExperimentOptions, open_console, open_runner, size_of, text_of
from scripts.experiments.runs import federation
from scripts.reports import Goal, publish
from scripts.studies.trials import Figures, Kinds, TrialRunner, commits_of

KINDS: Kinds = {"federation": federation, "pooled": pooled, "alone": alone, "attacked": attacked}


def do_studies(size: Size, chosen: str, runner: TrialRunner, console: Console) -> Figures:
    """Do the chosen studies ("a", "b", "c" or "all"), print their tables and return their figures."""
    figures: Figures = {}
    if chosen in ("a", "all"):
        figures["methods"] = methods_study(size.methods, runner)
        for table in methods_tables(figures["methods"]):
            console.print("\n", table)
    if chosen in ("b", "all"):
        figures["rho_map"] = map_study(size.rho_map, runner)
        console.print("\n", map_table(figures["rho_map"]))
    if chosen in ("c", "all") and size.poison is not None:
        figures["poison"] = poison_study(size.poison, runner)
        for table in poison_tables(figures["poison"]):
            console.print("\n", table)
    return figures


def draw(figures: Figures, folder: Path) -> None:
    """Draw the plots of the studies that were done."""
    if "methods" in figures:
        draw_methods(figures["methods"], DOMAIN, folder / "aggregation_methods.svg")
    if "rho_map" in figures:
        draw_rho(figures["rho_map"], folder)


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    """What can be asked for."""

    study: Annotated[Literal["a", "b", "c", "all"], typer.Option(help="Which study.")] = "all"


def main(options: Options) -> None:
    """Do the studies, print and keep their figures."""
    console = open_console(options)
    size = size_of(options, full=FULL, quick=QUICK, embedded=SMOLLM2)
    corpus, clients = text_of(options, size, console), size.rho_map.clients
    with open_runner(options, "aggregation", size, corpus, KINDS, console, clients=clients) as opened:
        runner, shared = opened
        figures = do_studies(size, options.study, runner, console)
    if options.plot:
        draw(figures, options.plot)
    settings = {
        "study": options.study,
        "quick": options.quick,
        "flat": dict(size.flat),
        "commits": commits_of(runner.journal),
    }
    judged: dict[str, Goal] = goals(figures["poison"]) if "poison" in figures else {}
    publish(options, "aggregation", {**shared, "settings": settings, **figures}, judged)
