"""What distilling the clients' ensemble back into one adapter gains, and where it harms.

Clients of seven domains train a few rounds. From the last round's aggregate and adapters every teacher
(posterior, uniform, logit mean) and a control that is tuned on the same rows as plain text start alike, on
each text: public text like the clients' own, like that of three of them, unlike any, and synthetic text.

    python -m scripts.experiments.distillation.main --quick --json
    python -m scripts.experiments.distillation.main --data ../shared/data --output
    docs/results/distillation.json

Losses are on rows that the clients hold out. The learning rate of a student is chosen on the texts its gate
looks at, never on those. A gap is closed by 1 where a student is as good as the posterior ensemble itself.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from zlib import crc32

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no cell asks the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every process

from rich.console import Console

from fedllm.config.key import Scalar
from fedllm.errors import DataError, FedLLMError
from fedllm.originality.duplicates import contaminated
from scripts.experiments.aggregation.methods import Do
from scripts.experiments.cells import Cell, Figures, Kinds, open_pool
from scripts.experiments.controls import pooled
from scripts.experiments.corpus import Corpus, Row, read_corpus, write_rows
from scripts.experiments.distillation.run import distilled
from scripts.experiments.distillation.tables import draw_gaps, losses_table, summary
from scripts.experiments.plots import check_matplotlib
from scripts.experiments.small_model import Recipe
from scripts.experiments.workshop import (
    ONE_THREAD,
    experiment_parser,
    open_workshop,
    parse_options,
    scale_of,
)
from scripts.reports import Goal, emit, report

KINDS: Kinds = {"distilled": distilled, "pooled": pooled}
UNLIKE = "shakespeare.train.jsonl"
PUBLIC_EVERY = 4  # of the rows of a domain one in so many is public
GOAL_GAP = 0.35  # of the aggregate-to-ensemble gap, with synthetic text alone


@dataclass(frozen=True)
class Scale:
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
FULL = Scale(
    flat={
        **_FLAT,
        "federation.num-rounds": 4,
        "train.local-steps": 10,
        "train.learning-rate": 1e-2,
        "data.max-rows": 160,
        "data.max-held-out": 24,
        "distill.num-texts": 256,
        "distill.steps": 100,
        "distill.batch-size": 8,
    },
    rows_of_domain=320,
    seeds=(1, 2, 3),
    rates=(1e-3, 3e-3, 1e-2),
    recipe=Recipe(),
)
QUICK = Scale(
    flat={
        **_FLAT,
        "federation.num-rounds": 2,
        "train.local-steps": 3,
        "train.learning-rate": 1e-2,
        "data.max-rows": 32,
        "data.max-held-out": 4,
        "train.max-length": 96,
        "distill.max-tokens": 64,
        "distill.num-texts": 16,
        "distill.steps": 4,
        "distill.batch-size": 4,
    },
    rows_of_domain=64,
    seeds=(1,),
    rates=(3e-3,),
    recipe=Recipe(steps=100),
)
SMOLLM2 = Scale(
    flat={
        **_FLAT,
        "federation.num-rounds": 3,
        "train.local-steps": 4,
        "train.learning-rate": 1e-3,
        "data.max-rows": 64,
        "data.max-held-out": 4,
        "distill.max-tokens": 96,
        "distill.num-texts": 48,
        "distill.steps": 24,
        "distill.batch-size": 4,
    },
    rows_of_domain=240,
    seeds=(1,),
    rates=(2e-4, 6e-4),
)


def part_public(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Return the clients' rows and public rows of the same domains, of which none is nearly a client's."""
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


def study(scale: Scale, texts: dict[str, str], do: Do, console: Console) -> Figures:
    """Do every cell, print the table and return the figures."""
    options: dict[str, Scalar] = {f"text:{name}": text for name, text in texts.items()}
    options["rates"] = ",".join(f"{rate:g}" for rate in scale.rates)
    cells = [
        Cell("distillation", kind, {"kind": kind, "seed": seed}, {"seed": seed}, options if taught else {})
        for seed in scale.seeds
        for kind, taught in (("distilled", True), ("pooled", False))
    ]
    outcomes = do(cells)
    for outcome in outcomes:
        if not outcome.is_done:
            console.print(f"{outcome.cell.labels}: {outcome.reason}")
    figures = summary(outcomes)
    for lost in figures["lost"]:
        console.print(f"{lost['text']}, seed {lost['seed']}: {lost['reason']}")
    console.print("\n", losses_table(figures))
    return figures


def goals_of(figures: Figures) -> dict[str, Goal]:
    """Return the goals: the gap that synthetic text closes, and that no kept student harms the clients.

    What no cell has measured is not a number, and such a goal is not met.
    """
    by_teacher = figures["texts"].get("synthetic")
    closed = by_teacher["posterior"]["gap_closed"]["mean"] if by_teacher else math.nan
    return {
        "gap_closed_by_synthetic_text": Goal(closed, GOAL_GAP),
        "harm_of_the_worst_kept_student": Goal(figures["worst_kept_harm"], 0.0, at_most=True),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = experiment_parser("distillation", "The gain of distillation, by teacher and text.")
    parser.add_argument("--one-shot", action="store_true", help="all local steps in one round")
    parser.add_argument("--texts", default="", help="these choices of text only, separated by commas")
    return parse_options(parser, arguments)


def one_shot(scale: Scale) -> Scale:
    """Return the scale with the local steps of all rounds in one: clients move furthest apart."""
    numbers = scale.flat
    steps = int(numbers["federation.num-rounds"]) * int(numbers["train.local-steps"])
    return replace(scale, flat={**numbers, "federation.num-rounds": 1, "train.local-steps": steps})


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the experiment, print and keep its figures."""
    options = parse(arguments)
    console = Console(stderr=options.json, highlight=False)
    notice = partial(console.print, soft_wrap=True)
    scale = scale_of(options, full=FULL, quick=QUICK, embedded=SMOLLM2)
    scale = one_shot(scale) if options.one_shot else scale
    try:
        if options.plot:
            check_matplotlib()
        corpus = read_corpus(
            options.data, scale.rows_of_domain, keep_instructions=scale.recipe is None, notice=notice
        )
        private, public = part_public(corpus)
        texts = chosen(texts_of(public, options.work, options.data), options.texts)
        with open_pool(options.processes) as pool:
            workshop, shared = open_workshop(
                options, private, scale.flat, KINDS, notice, pool, recipe=scale.recipe
            )
            figures = study(scale, texts, workshop, console)
        if options.plot:
            draw_gaps(figures, options.plot / "distillation.svg")
    except FedLLMError as error:
        sys.exit(f"error: {error}")
    settings = {"quick": options.quick, "flat": scale.flat, "seeds": scale.seeds, "rates": scale.rates}
    result = report("distillation", {**shared, "settings": settings, **figures}, goals_of(figures))
    emit(result, as_json=options.json, output=options.output)


if __name__ == "__main__":
    main()
