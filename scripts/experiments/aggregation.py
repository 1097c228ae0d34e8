"""Three studies of aggregation on clients of unlike text, with the product itself, seeded and resumable.

a: every method, its learning rate tuned, beside local-only, centralised and one-shot training
b: the map of rho, the error of averaging factors, and what that error costs
c: malicious clients, robust rules and backdoors

    python -m scripts.experiments.aggregation --quick --json
    python -m scripts.experiments.aggregation --data ../shared/data --output docs/results/aggregation.json

A finished cell is a line of `cells.jsonl` in the folder --work; started again, a run takes those it needs
and does the rest. The full run takes about half an hour on two idle cores.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no cell asks the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every process

from rich.console import Console

from fedllm.errors import FedLLMError
from fedllm.models.files import fingerprint, resolve_model
from scripts.benchmarks.tools import Goal, emit, environment, report
from scripts.experiments import plots
from scripts.experiments.cells import Figures, Kinds, Setting, Workshop, open_pool, read_journal
from scripts.experiments.controls import alone, pooled
from scripts.experiments.corpus import Corpus, grouped, left_out_packages, read_corpus, write_rows
from scripts.experiments.hostile import attacked
from scripts.experiments.methods import DOMAIN, methods_study
from scripts.experiments.poison import goals, poison_study
from scripts.experiments.rho_map import map_study
from scripts.experiments.runs import federation
from scripts.experiments.scales import EMBEDDED, SMALL, Scale, scale_of
from scripts.experiments.small_model import small_model
from scripts.experiments.tables import map_table, methods_tables, poison_tables

KINDS: Kinds = {"federation": federation, "pooled": pooled, "alone": alone, "attacked": attacked}
PACKAGES = ("fedllm", "flwr", "torch", "transformers", "peft", "tokenizers", "numpy")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def open_workshop(
    options: argparse.Namespace, scale: Scale, console: Console, pool: Executor | None
) -> tuple[Workshop, Figures]:
    """Return where cells are done, and what the studies share as figures; makes the small model if needed.

    Raises:
        FedLLMError: the text or the model cannot be had.
    """

    def notice(line: str) -> None:
        console.print(line, soft_wrap=True)

    corpus = read_corpus(
        options.data, scale.rows_of_domain, keep_instructions=scale.recipe is None, notice=notice
    )
    model, described = _model(options.model, scale, corpus, notice)
    work = options.work
    rows_file = write_rows(work / f"rows-{corpus.digest[:16]}.jsonl", grouped(corpus, scale.rho_map.clients))
    digest = f"{fingerprint(resolve_model(model).folder)} {corpus.digest}"
    machine = environment(PACKAGES)
    journal = work / "cells.jsonl"
    if options.fresh:
        journal.unlink(missing_ok=True)
    shared = {
        "environment": machine,
        "model": described,
        "text": {"name": corpus.name, "rows": len(corpus.rows), "digest": corpus.digest},
    }
    setting = Setting(model, rows_file, scale.flat, digest)
    return Workshop(setting, KINDS, journal, machine["commit"], pool, notice), shared


def _model(
    name: str, scale: Scale, corpus: Corpus, notice: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """Return `model.name` and what the report says about the model."""
    if scale.recipe is None:
        return name, {"name": name}
    notice("the small model: made once on this machine, in a minute or two")
    made = small_model(scale.recipe, left_out=left_out_packages(corpus))
    notice(f"{made.parameters:,} parameters, held-out loss {made.held_out_loss:.3f} nats per token")
    figures = {
        "parameters": made.parameters,
        "trained_tokens": made.trained_tokens,
        "held_out_loss": made.held_out_loss,
        "uniform_loss": made.uniform_loss,
    }
    return str(made.folder), {"name": name, **figures}


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
    parser = argparse.ArgumentParser(description="Three studies of aggregation; see the module's docstring.")
    parser.add_argument("--study", choices=("a", "b", "c", "all"), default="all")
    parser.add_argument("--model", choices=(SMALL, EMBEDDED), default=SMALL)
    parser.add_argument("--quick", action="store_true", help="a tiny grid; under 3 minutes on two cores")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the seven instruction domains")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/aggregation"),
        help="folder of finished cells (default: %(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="do cells again that were finished before")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="of one thread each (default: %(default)s)",
    )
    parser.add_argument("--plot", type=Path, help="draw plots into this folder; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.add_argument("--output", type=Path, help="also keep the JSON object in this file")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the studies, print and keep their figures."""
    options = parse(arguments)
    console = Console(stderr=options.json, highlight=False)
    scale = scale_of(options.model, quick=options.quick)
    try:
        if options.plot:
            plots.check_matplotlib()
        with open_pool(options.processes) as pool:
            workshop, shared = open_workshop(options, scale, console, pool)
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
