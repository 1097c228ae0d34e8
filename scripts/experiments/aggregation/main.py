"""Three studies of aggregation on clients of unlike text, with the product itself, seeded and resumable.

a: every method, its learning rate tuned, beside local-only, centralised and one-shot training
b: the map of rho, the error of averaging factors, and what that error costs
c: malicious clients, robust rules and backdoors

    python -m scripts.experiments.aggregation.main --quick --json
    python -m scripts.experiments.aggregation.main --data ../shared/data --output
    docs/results/aggregation.json

A finished cell is a line of `cells.jsonl` in the folder --work; started again, a run takes those it needs
and does the rest. The full run takes about half an hour on two idle cores.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no cell asks the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every process

from rich.console import Console

from fedllm.errors import FedLLMError
from scripts.experiments import plots
from scripts.experiments.aggregation.hostile import attacked
from scripts.experiments.aggregation.methods import DOMAIN, methods_study
from scripts.experiments.aggregation.poison import goals, poison_study
from scripts.experiments.aggregation.rho_map import map_study
from scripts.experiments.aggregation.scales import FULL, QUICK, SMOLLM2, Scale
from scripts.experiments.aggregation.tables import map_table, methods_tables, poison_tables
from scripts.experiments.cells import Figures, Kinds, Workshop, open_pool, read_journal
from scripts.experiments.controls import alone, pooled
from scripts.experiments.corpus import read_corpus
from scripts.experiments.runs import federation
from scripts.experiments.workshop import experiment_parser, open_workshop, parse_options, scale_of
from scripts.reports import Goal, emit, report

KINDS: Kinds = {"federation": federation, "pooled": pooled, "alone": alone, "attacked": attacked}


def do_studies(scale: Scale, chosen: str, workshop: Workshop, console: Console) -> Figures:
    """Do the chosen studies ("a", "b", "c" or "all"), print their tables and return their figures."""
    figures: Figures = {}
    if chosen in ("a", "all"):
        figures["methods"] = methods_study(scale.methods, workshop)
        for table in methods_tables(figures["methods"]):
            console.print("\n", table)
    if chosen in ("b", "all"):
        figures["rho_map"] = map_study(scale.rho_map, workshop)
        console.print("\n", map_table(figures["rho_map"]))
    if chosen in ("c", "all") and scale.poison is not None:
        figures["poison"] = poison_study(scale.poison, workshop)
        for table in poison_tables(figures["poison"]):
            console.print("\n", table)
    return figures


def draw(figures: Figures, folder: Path) -> None:
    """Draw the plots of the studies that were done."""
    if "methods" in figures:
        plots.method_dots(figures["methods"], DOMAIN, folder / "aggregation_methods.svg")
    if "rho_map" in figures:
        plots.rho_scatter(figures["rho_map"], folder / "aggregation_rho_gap.svg")
        plots.rho_lines(figures["rho_map"], folder / "aggregation_rho.svg")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    description = "Three studies of aggregation; see the module's docstring."
    parser = experiment_parser("aggregation", description)
    parser.add_argument("--study", choices=("a", "b", "c", "all"), default="all")
    return parse_options(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the studies, print and keep their figures."""
    options = parse(arguments)
    console = Console(stderr=options.json, highlight=False)
    notice = partial(console.print, soft_wrap=True)
    scale = scale_of(options, full=FULL, quick=QUICK, embedded=SMOLLM2)
    try:
        if options.plot:
            plots.check_matplotlib()
        corpus = read_corpus(
            options.data, scale.rows_of_domain, keep_instructions=scale.recipe is None, notice=notice
        )
        with open_pool(options.processes) as pool:
            workshop, shared = open_workshop(
                options,
                corpus,
                scale.flat,
                KINDS,
                notice,
                pool,
                recipe=scale.recipe,
                clients=scale.rho_map.clients,
            )
            figures = do_studies(scale, options.study, workshop, console)
        if options.plot:
            draw(figures, options.plot)
    except FedLLMError as error:
        sys.exit(f"error: {error}")
    judged: dict[str, Goal] = goals(figures["poison"]) if "poison" in figures else {}
    settings = {
        "study": options.study,
        "quick": options.quick,
        "flat": dict(scale.flat),
        # cells that an earlier run left in the folder keep the commit they were done at
        "commits": sorted({line["commit"] for line in read_journal(workshop.journal).values()}),
    }
    result = report("aggregation", {**shared, "settings": settings, **figures}, judged)
    emit(result, as_json=options.json, output=options.output)


if __name__ == "__main__":
    main()
