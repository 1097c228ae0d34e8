"""What privacy costs, and what it hides: held-out loss and membership attacks over epsilon, by preset.

silos    seven domains, a client each with some 560 rows. The unit is a row (DP-SGD, Poisson batches of 32)
clients  140 clients of some 27 rows, Dirichlet mixtures of the domains. The unit is a client; the server
         adds the noise, and every client takes part in a round by its own coin. Clipping alone is a control:
         noise too small to matter, in cohorts of a fixed size

Membership attacks are those of `fedllm audit`. In the silos they have its positive control, one client's rows
learnt by heart: where they find nothing there, their other figures say nothing.

    python -m scripts.experiments.privacy.main --quick --json
    python -m scripts.experiments.privacy.main --data ../shared/data --output docs/results/privacy.json

The learning rate and the clip of a preset, private or not, are chosen on a seed that is not reported; looking
at those runs is not charged to any epsilon. A is orthonormal everywhere, so runs of a preset differ by
clipping, noise, sampling and what was tuned. A finished cell is a line of `cells.jsonl` in the folder --work;
noise comes from the operating system, so a cell that is done again gives another draw. The full run has 117
cells.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no cell asks the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every process

from rich.console import Console

from fedllm.config.key import Scalar
from fedllm.errors import FedLLMError
from fedllm.privacy.accounting import check_installed
from scripts.experiments.aggregation.methods import Do
from scripts.experiments.cells import Figures, Kinds, open_pool, read_journal
from scripts.experiments.corpus import read_corpus
from scripts.experiments.plots import check_matplotlib
from scripts.experiments.privacy.run import by_heart, private
from scripts.experiments.privacy.study import Part, study
from scripts.experiments.privacy.tables import draw_utility, goals_of, privacy_tables
from scripts.experiments.small_model import Recipe
from scripts.experiments.workshop import (
    ONE_THREAD,
    experiment_parser,
    open_workshop,
    parse_options,
    scale_of,
)
from scripts.reports import emit, report

KINDS: Kinds = {"private": private, "by heart": by_heart}
SILOS, CLIENTS = "silos", "clients"
PRESETS = ("ffa", "fedit", "rolora")


@dataclass(frozen=True)
class Scale:
    """One size of the experiment; `flat` holds the keys of all runs."""

    flat: Mapping[str, Scalar]
    rows_of_domain: int
    parts: tuple[Part, ...]
    recipe: Recipe | None = None


_FLAT: dict[str, Scalar] = {
    **ONE_THREAD,
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "lora.init-a": "orthonormal",  # as under privacy, so that it is not what differs
    "train.max-length": 128,
}
_SEVEN: dict[str, Scalar] = {"federation.num-clients": 7, "data.partition": "column:domain"}
_BY_ROW: dict[str, Scalar] = {"privacy.unit": "example", "privacy.delta": 1e-5}
_MANY: dict[str, Scalar] = {
    "data.partition": "dirichlet:domain:1.0",
    "federation.selection": "poisson",
    "aggregation.weighting": "uniform",
}
_BY_CLIENT: dict[str, Scalar] = {
    "privacy.unit": "client",
    "privacy.trust": "central",
    "privacy.delta": 1e-3,  # a seventh of 1 / clients
}
_CLIPPED: dict[str, Scalar] = {"federation.selection": "uniform"}  # coins cannot be counted at that budget

FULL = Scale(
    flat=_FLAT,
    rows_of_domain=600,
    parts=(
        Part(
            SILOS,
            flat={
                **_SEVEN,
                "federation.num-rounds": 4,
                "train.local-steps": 4,
                "train.batch-size": 32,
                "data.held-out-fraction": 0.1,
                "data.max-held-out": 40,
            },
            private=_BY_ROW,
            presets=PRESETS,
            epsilons=(1.0, 3.0, 8.0),
            seeds=(1, 2, 3),
            rates=(1e-2, 3e-2, 1e-1),
            private_rates=(1e-2, 3e-2),
            clips=(0.5, 2.0),
            audit_rows=280,
            epochs=20,
        ),
        Part(
            CLIENTS,
            flat={
                **_MANY,
                "federation.num-clients": 140,
                "federation.cohort": 42,
                "federation.num-rounds": 6,
                "train.local-steps": 2,
                "train.batch-size": 4,
                "data.held-out-fraction": 0.1,
                "data.max-held-out": 4,
            },
            private=_BY_CLIENT,
            presets=PRESETS,
            epsilons=(1.0, 3.0, 8.0),
            seeds=(1, 2, 3),
            rates=(1e-2, 3e-2),
            private_rates=(3e-2,),
            clips=(0.5, 2.0),
            clipped=_CLIPPED,
            tuning_epsilon=8.0,
            audit_rows=280,
        ),
    ),
    recipe=Recipe(width=64, inner=176, heads=2),
)
QUICK = Scale(
    flat={**_FLAT, "train.max-length": 96},
    rows_of_domain=64,
    parts=(
        Part(
            SILOS,
            flat={
                **_SEVEN,
                "federation.num-rounds": 2,
                "train.local-steps": 2,
                "train.batch-size": 8,
                "data.held-out-fraction": 0.2,
            },
            private=_BY_ROW,
            presets=PRESETS,
            epsilons=(8.0,),
            seeds=(1,),
            rates=(3e-2,),
            private_rates=(3e-2,),
            clips=(1.0,),
            audit_rows=64,
            epochs=10,
        ),
        Part(
            CLIENTS,
            flat={
                **_MANY,
                "federation.num-clients": 28,
                "federation.cohort": 14,
                "federation.num-rounds": 2,
                "train.local-steps": 1,
                "train.batch-size": 2,
                "data.held-out-fraction": 0.2,
                "data.max-held-out": 2,
            },
            private=_BY_CLIENT,
            presets=("ffa",),
            epsilons=(8.0,),
            seeds=(1,),
            rates=(3e-2,),
            private_rates=(3e-2,),
            clips=(0.5, 2.0),
            clipped=_CLIPPED,
            tuning_epsilon=8.0,
            audit_rows=64,
        ),
    ),
    recipe=Recipe(width=64, inner=176, heads=2, steps=100),
)
SMOLLM2 = Scale(
    flat={**_FLAT, "train.max-length": 96},
    rows_of_domain=240,
    parts=(
        Part(
            SILOS,
            flat={
                **_SEVEN,
                "federation.num-rounds": 2,
                "train.local-steps": 3,
                "train.batch-size": 8,
                "data.held-out-fraction": 0.1,
                "data.max-held-out": 8,
            },
            private=_BY_ROW,
            presets=("ffa", "fedit"),
            epsilons=(8.0,),
            seeds=(1,),
            rates=(3e-3,),
            private_rates=(3e-3,),
            clips=(1.0,),
            audit_rows=56,
            epochs=10,
        ),
    ),
)


def do_parts(scale: Scale, do: Do, console: Console) -> dict[str, Figures]:
    """Do every part, print the tables and return the figures by part."""
    parts = {part.name: study(part, do) for part in scale.parts}
    for name, figures in parts.items():
        for reason in figures["reasons"]:
            console.print(f"{name}: {reason}", soft_wrap=True)
    for table in privacy_tables(parts):
        console.print("\n", table)
    return parts


def draw(parts: Mapping[str, Figures], folder: Path) -> None:
    """Draw the utility curve of every part that has figures."""
    units = {SILOS: "one row is hidden", CLIENTS: "one client is hidden"}
    for name, figures in parts.items():
        if figures["rows"]:
            draw_utility(figures, f"{name}: {units[name]}", folder / f"privacy_{name}.svg")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    description = "Utility and membership attacks over epsilon, by preset."
    return parse_options(experiment_parser("privacy", description), arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the experiment, print and keep its figures."""
    options = parse(arguments)
    console = Console(stderr=options.json, highlight=False)
    notice = partial(console.print, soft_wrap=True)
    scale = scale_of(options, full=FULL, quick=QUICK, embedded=SMOLLM2)
    try:
        check_installed()
        if options.plot:
            check_matplotlib()
        corpus = read_corpus(
            options.data, scale.rows_of_domain, keep_instructions=scale.recipe is None, notice=notice
        )
        with open_pool(options.processes) as pool:
            workshop, shared = open_workshop(
                options, corpus, scale.flat, KINDS, notice, pool, recipe=scale.recipe
            )
            parts = do_parts(scale, workshop, console)
        if options.plot:
            draw(parts, options.plot)
    except FedLLMError as error:
        sys.exit(f"error: {error}")
    settings = {
        "quick": options.quick,
        "flat": dict(scale.flat),
        "parts": {part.name: {"flat": part.flat, "private": part.private} for part in scale.parts},
        # cells that an earlier run left in the folder keep the commit they were done at
        "commits": sorted({line["commit"] for line in read_journal(workshop.journal).values()}),
    }
    result = report("privacy", {**shared, "settings": settings, "parts": parts}, goals_of(parts))
    emit(result, as_json=options.json, output=options.output)


if __name__ == "__main__":
    main()
