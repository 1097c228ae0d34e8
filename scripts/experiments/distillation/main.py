"""What distilling the clients' ensemble back into one adapter gains, and where it harms.

Clients of seven domains train a few rounds. From the last round's aggregate and adapters every teacher
(posterior, uniform, logit mean) and a control that is tuned on the same rows as plain text start alike, on
each text: public text like the clients' own, like that of three of them, unlike any, and synthetic text.

    python -m scripts.experiments distillation --quick --json
    python -m scripts.experiments distillation --data FOLDER --output docs/results/distillation.json
    python -m scripts.experiments distillation --shapes 1x50,1x100,1x200,3x50 --data FOLDER

With --shapes the rounds and local steps of a run are varied instead: is the ensemble ahead where clients
train long between rounds, does a student keep that, and what do many rounds of few steps reach?

Losses are on rows that the clients hold out. The learning rate of a student is chosen on the texts its gate
looks at, never on those. A gap is closed by 1 where a student is as good as the posterior ensemble itself.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from zlib import crc32

import typer
from rich.console import Console

from fedllm.config.key import Scalar
from fedllm.errors import DataError
from fedllm.originality.duplicates import contaminated
from scripts.experiments.controls import pooled
from scripts.experiments.corpus import Corpus, Row, write_rows
from scripts.experiments.distillation.run import distilled
from scripts.experiments.distillation.shapes import (
    curve,
    parse_shapes,
    shapes_goals,
    shapes_study,
    shapes_table,
)
from scripts.experiments.distillation.tables import draw_gaps, losses_table, summary
from scripts.experiments.options import (
    ONE_THREAD,
    ExperimentOptions,
    open_console,
    open_runner,
    size_of,
    text_of,
    work_folder,
)
from scripts.experiments.small_model import Recipe
from scripts.reports import Goal, publish
from scripts.studies.trials import Figures, Kinds, RunTrials, Trial

KINDS: Kinds = {"distilled": distilled, "pooled": pooled, "curve": curve}
UNLIKE = "shakespeare.train.jsonl"
PUBLIC_EVERY = 4  # of the rows of a domain one in so many is public
GOAL_GAP = 0.35  # of the aggregate-to-ensemble gap, with synthetic text alone


@dataclass(frozen=True)
class Size:
    """One size of the experiment; the first of `seeds` draws everything where it is the only one."""

    flat: dict[str, Scalar]
    rows_of_domain: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    recipe: Recipe | None = None


_FLAT: dict[str, Scalar] = {
    **ONE_THREAD,
    "lora.rank": 8,
    "lora.alpha": 16.0,
    "federation.num-clients": 7,
    "data.partition": "column:domain",
    "data.held-out-fraction": 0.2,
    "train.max-length": 128,
    "train.batch-size": 4,
    "distill.when": "last",
    "distill.max-tokens": 128,
}
# What the sizes differ in, in the order of their numbers.
_NAMES = (
    *("federation.num-rounds", "train.local-steps", "train.learning-rate", "data.max-rows"),
    *("data.max-held-out", "distill.num-texts", "distill.steps", "distill.batch-size"),
)


def _flat(*numbers: float, **changes: int) -> dict[str, Scalar]:
    changed = {name.replace("__", ".").replace("_", "-"): number for name, number in changes.items()}
    return {**_FLAT, **dict(zip(_NAMES, numbers, strict=True)), **changed}


FULL = Size(
    flat=_flat(4, 10, 1e-2, 160, 24, 256, 100, 8),
    rows_of_domain=320,
    seeds=(1, 2, 3),
    rates=(1e-3, 3e-3, 1e-2),
    recipe=Recipe(),
)
QUICK = Size(
    flat=_flat(2, 3, 1e-2, 32, 4, 16, 4, 4, train__max_length=96, distill__max_tokens=64),
    rows_of_domain=64,
    seeds=(1,),
    rates=(3e-3,),
    recipe=Recipe(steps=100),
)
SMOLLM2 = Size(
    flat=_flat(3, 4, 1e-3, 64, 4, 48, 24, 4, distill__max_tokens=96),
    rows_of_domain=240,
    seeds=(1,),
    rates=(2e-4, 6e-4),
)
# Clients train longer here, on more rows, and hold more out, so that small differences can be told.
SMOLLM2_SHAPES = Size(
    flat=_flat(1, 50, 1e-3, 160, 16, 96, 48, 4, distill__max_tokens=96),
    rows_of_domain=280,
    seeds=(1,),
    rates=(3e-4, 1e-3),
)


def part_public(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Return the clients' rows, and public rows of the same domains without near copies of a client's."""
    seen = dict.fromkeys(corpus.domains, 0)
    private: list[Row] = []
    public: list[Row] = []
    for row in corpus.rows:
        seen[row["domain"]] += 1
        (public if seen[row["domain"]] % PUBLIC_EVERY == 0 else private).append(row)
    copies = contaminated([_words(row) for row in public], [_words(row) for row in private])
    fresh = tuple(row for row, is_copy in zip(public, copies, strict=True) if not is_copy)
    return Corpus(corpus.name, tuple(private)), Corpus(f"{corpus.name}, public", fresh)


def _words(row: Row) -> list[int]:
    """Return the words of a row as numbers."""
    return [crc32(word.encode()) for word in f"{row['prompt']} {row['response']}".split()]


def texts_of(public: Corpus, folder: Path, data: Path) -> dict[str, str]:
    """Return `distill.text` for every choice of text, writing public rows to `folder`.

    Raises:
        DataError: a file cannot be written.
    """
    name = public.digest[:16]
    three = public.domains[::3]
    some = tuple(row for row in public.rows if row["domain"] in three)
    texts = {
        "in domain": str(write_rows(folder / f"public-{name}.jsonl", public.rows)),
        f"{len(three)} of {len(public.domains)} domains": str(
            write_rows(folder / f"some-{name}.jsonl", some)
        ),
        "synthetic": "synthetic",
    }
    if (data / UNLIKE).is_file():
        texts["out of domain"] = str(data / UNLIKE)
    return texts


def taught_with(size: Size, texts: dict[str, str]) -> dict[str, Scalar]:
    """Return the options of a trial that teaches: its texts and the rates of its students."""
    named = {f"text:{name}": text for name, text in texts.items()}
    return {**named, "rates": ",".join(f"{rate:g}" for rate in size.rates)}


def study(size: Size, texts: dict[str, str], do: RunTrials, console: Console) -> Figures:
    """Do every trial, print the table and return the figures."""
    options = taught_with(size, texts)
    trials = [
        Trial("distillation", kind, {"kind": kind, "seed": seed}, {"seed": seed}, options if taught else {})
        for seed in size.seeds
        for kind, taught in (("distilled", True), ("pooled", False))
    ]
    outcomes = do(trials)
    for outcome in outcomes:
        if not outcome.is_done:
            console.print(f"{outcome.trial.labels}: {outcome.reason}")
    figures = summary(outcomes)
    for lost in figures["lost"]:
        console.print(f"{lost['text']}, seed {lost['seed']}: {lost['reason']}")
    console.print("\n", losses_table(figures))
    return figures


def goals_of(figures: Figures) -> dict[str, Goal]:
    """Return the goals: the gap that synthetic text closes, and that no kept student harms the clients.

    What no trial has measured is not a number, and such a goal is not met.
    """
    by_teacher = figures["texts"].get("synthetic")
    closed = by_teacher["posterior"]["gap_closed"]["mean"] if by_teacher else math.nan
    return {
        "gap_closed_by_synthetic_text": Goal(closed, GOAL_GAP),
        "harm_of_the_worst_kept_student": Goal(figures["worst_kept_harm"], 0.0, at_most=True),
    }


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    """What can be asked for."""

    shapes: Annotated[str, typer.Option(help="ROUNDSxSTEPS,... of runs to compare, as 1x50,3x50.")] = ""
    few: Annotated[int, typer.Option(min=1, help="Steps of a round where rounds are many.")] = 10
    seeds: Annotated[int, typer.Option(min=0, help="How many; 0 = as many as the size has.")] = 0
    texts: Annotated[str, typer.Option(help="These choices of text only, separated by commas.")] = ""
    device: Annotated[str, typer.Option(help="Where it computes: cpu or cuda.")] = "cpu"


def asked_size(options: Options) -> Size:
    """Return the size that the options ask for, with their seeds, on their device."""
    embedded = SMOLLM2_SHAPES if options.shapes else SMOLLM2
    size = size_of(options, full=FULL, quick=QUICK, embedded=embedded)
    seeds = tuple(range(1, options.seeds + 1)) or size.seeds
    return replace(size, flat={**size.flat, "model.device": options.device}, seeds=seeds)


def chosen(texts: dict[str, str], names: str) -> dict[str, str]:
    """Return the choices of text that are named, all where none is.

    Raises:
        DataError: there is no such choice.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in texts:
            raise DataError(f"--texts {name}: expected one of {', '.join(texts)}")
    return {name: text for name, text in texts.items() if name in wanted or not wanted}


def main(options: Options) -> None:
    """Do the experiment, print and keep its figures."""
    console = open_console(options)
    shapes, size = parse_shapes(options.shapes), asked_size(options)
    private, public = part_public(text_of(options, size, console))
    texts = chosen(texts_of(public, work_folder(options, "distillation"), options.data), options.texts)
    with open_runner(options, "distillation", size, private, KINDS, console) as (runner, shared):
        if shapes:
            figures = shapes_study(shapes, options.few, size.seeds, taught_with(size, texts), runner)
            console.print("\n", shapes_table(figures))
        else:
            figures = study(size, texts, runner, console)
    if options.plot and not shapes:
        draw_gaps(figures, options.plot / "distillation.svg")
    settings = {"quick": options.quick, "flat": size.flat, "seeds": size.seeds, "rates": size.rates}
    goals = shapes_goals(figures) if shapes else goals_of(figures)
    publish(options, "distillation", {**shared, "settings": settings, **figures}, goals)
