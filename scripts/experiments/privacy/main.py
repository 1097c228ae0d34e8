"""What privacy costs, and what it hides: held-out loss and membership attacks over epsilon, by preset.

silos    seven domains, a client each with some 560 rows. The unit is a row (DP-SGD, Poisson batches of 32)
clients  140 clients of some 27 rows, Dirichlet mixtures of the domains. The unit is a client; the server
         adds the noise, and every client takes part in a round by its own coin. Clipping alone is a control:
         noise too small to matter, in cohorts of a fixed size
shares   96 clients in every round: noise of a server against shares of noise under masks. On request

Membership attacks are those of `fedllm audit`. In the silos they have its positive control, one client's rows
learnt by heart: where they find nothing there, their other figures say nothing.

    python -m scripts.experiments privacy --quick --json
    python -m scripts.experiments privacy --data FOLDER --output docs/results/privacy.json
    python -m scripts.experiments privacy --study shares --data FOLDER --output docs/results/shares.json

The learning rate and the clip of a preset, private or not, are chosen on a seed that is not reported; looking
at those runs is not charged to any epsilon. A is orthonormal everywhere, so runs of a preset differ by
clipping, noise, sampling and what was tuned. A finished trial is a line of `trials.jsonl` in the folder
--work; noise comes from the operating system, so a trial that is done again gives another draw. The full run
has 117 trials.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from fedllm.config.key import Scalar
from fedllm.privacy.accounting import check_installed
from scripts.experiments.options import (
    ONE_THREAD,
    ExperimentOptions,
    open_console,
    open_runner,
    size_of,
    text_of,
)
from scripts.experiments.privacy.run import by_heart, private
from scripts.experiments.privacy.shares import shares_goals, shares_parts
from scripts.experiments.privacy.study import Part, study
from scripts.experiments.privacy.tables import draw_utility, goals_of, privacy_tables
from scripts.experiments.small_model import Recipe
from scripts.reports import publish
from scripts.studies.trials import Figures, Kinds, RunTrials, commits_of

KINDS: Kinds = {"private": private, "by heart": by_heart}
SILOS, CLIENTS = "silos", "clients"
PRESETS = ("ffa", "fedit", "rolora")


@dataclass(frozen=True)
class Size:
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

FULL_SILOS = Part(
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
)
FULL_CLIENTS = Part(
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
)
FULL = Size(
    flat=_FLAT,
    rows_of_domain=600,
    parts=(FULL_SILOS, FULL_CLIENTS),
    recipe=Recipe(width=64, inner=176, heads=2),
)
_QUICK_SILOS: dict[str, Scalar] = {
    **_SEVEN,
    **{"federation.num-rounds": 2, "train.local-steps": 2, "train.batch-size": 8},
    "data.held-out-fraction": 0.2,
}
_QUICK_CLIENTS: dict[str, Scalar] = {
    **FULL_CLIENTS.flat,
    **{"federation.num-clients": 28, "federation.cohort": 14, "federation.num-rounds": 2},
    **{"train.local-steps": 1, "train.batch-size": 2, "data.held-out-fraction": 0.2, "data.max-held-out": 2},
}


def _brief(part: Part, rate: float, **changes: Any) -> Part:
    """Return a part with one epsilon, seed and learning rate."""
    return replace(part, epsilons=(8.0,), seeds=(1,), rates=(rate,), private_rates=(rate,), **changes)


QUICK = Size(
    flat={**_FLAT, "train.max-length": 96},
    rows_of_domain=64,
    parts=(
        _brief(FULL_SILOS, 3e-2, flat=_QUICK_SILOS, clips=(1.0,), audit_rows=64, epochs=10),
        _brief(FULL_CLIENTS, 3e-2, flat=_QUICK_CLIENTS, presets=("ffa",), audit_rows=64),
    ),
    recipe=Recipe(width=64, inner=176, heads=2, steps=100),
)
_SMOLLM2: dict[str, Scalar] = {
    **FULL_SILOS.flat,
    **{"federation.num-rounds": 2, "train.local-steps": 3, "train.batch-size": 8, "data.max-held-out": 8},
}
SMOLLM2 = Size(
    flat={**_FLAT, "train.max-length": 96},
    rows_of_domain=240,
    parts=(
        _brief(
            *(FULL_SILOS, 3e-3),
            flat=_SMOLLM2,
            presets=("ffa", "fedit"),
            clips=(1.0,),
            audit_rows=56,
            epochs=10,
        ),
    ),
)


def do_parts(size: Size, do: RunTrials, console: Console) -> dict[str, Figures]:
    """Do every part, print the tables and return the figures by part."""
    parts = {part.name: study(part, do) for part in size.parts}
    for name, figures in parts.items():
        for reason in figures["reasons"]:
            console.print(f"{name}: {reason}", soft_wrap=True)
    for table in privacy_tables(parts):
        console.print("\n", table)
    return parts


def draw(parts: Mapping[str, Figures], folder: Path) -> None:
    """Draw the utility curve of every part that has figures."""
    units = {SILOS: "one row is hidden"}
    for name, figures in parts.items():
        if figures["rows"]:
            title = f"{name}: {units.get(name, 'one client is hidden')}"
            draw_utility(figures, title, folder / f"privacy_{name.replace(' ', '_')}.svg")


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    """What can be asked for."""

    study: Annotated[Literal["epsilons", "shares"], typer.Option(help="Which study.")] = "epsilons"


def main(options: Options) -> None:
    """Do the experiment, print and keep its figures."""
    check_installed()
    console = open_console(options)
    size = size_of(options, full=FULL, quick=QUICK, embedded=SMOLLM2)
    if options.study == "shares":
        size = replace(size, parts=shares_parts(quick=options.quick))
    corpus = text_of(options, size, console)
    with open_runner(options, "privacy", size, corpus, KINDS, console) as (runner, shared):
        parts = do_parts(size, runner, console)
    if options.plot:
        draw(parts, options.plot)
    settings = {
        "quick": options.quick,
        "flat": dict(size.flat),
        "parts": {part.name: {"flat": part.flat, "private": part.private} for part in size.parts},
        "commits": commits_of(runner.journal),
    }
    goals = {**goals_of(parts), **shares_goals(parts)}
    publish(options, "privacy", {**shared, "settings": settings, "parts": parts}, goals)
