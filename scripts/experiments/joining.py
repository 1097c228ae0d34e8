"""Where joining pays: training alone against a federation and steps at home, each at its own best.

domains     seven domains of instructions, a client each: as unlike as clients can be, with few rows
institutes  six medical institutes, which answer questions of one kind
speakers    sixty speakers of plays, with little text each: a keyboard's users

Without --data the clients are the docstrings of seven packages. Each part is a study, as `fedllm study` does
it: every method may spend the same steps, its number of them and its learning rate are chosen on rows that
measure nothing, and a finished cell is a line in the folder --work. --rows changes how many rows each domain
trains on: where everybody has enough of them, joining has little to give.

    python -m scripts.experiments joining --quick --json
    python -m scripts.experiments joining --data FOLDER --output docs/results/joining.json
    python -m scripts.experiments joining --model smollm2-135m-instruct --data FOLDER --json
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.data.rows import read_local_rows
from scripts.experiments.corpus import Corpus, Row, write_rows
from scripts.experiments.options import (
    ONE_THREAD,
    PACKAGES,
    ExperimentOptions,
    model_of,
    open_console,
    size_of,
    text_of,
    work_folder,
)
from scripts.experiments.small_model import Recipe
from scripts.reports import Goal, environment, publish
from scripts.studies.cells import Study
from scripts.studies.doing import do_in
from scripts.studies.findings import findings, study_tables
from scripts.studies.summary import Summary

METHODS = ("base", "alone", "centralised", "federated", "home")
GOAL = 0.9  # of the clients gain over training alone
INSTITUTES, SPEAKERS = "medical.train.jsonl", "shakespeare.train.jsonl"


@dataclass(frozen=True)
class Part:
    """The numbers of one part: rounds of so many steps, `home` steps after them, and the rows of a step.

    `rows` are those that each client trains on, drawn from all it has by the seed; 0 = all.
    """

    rounds: int
    steps: int
    home: int
    batch_size: int
    max_length: int
    clients: int = 0  # 0 = all there are
    rows: int = 0


@dataclass(frozen=True)
class Size:
    """One size of the experiment; `flat` holds the keys of all runs."""

    flat: Mapping[str, Scalar]
    rows_of_domain: int
    parts: Mapping[str, Part]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    recipe: Recipe | None = None


_FLAT: dict[str, Scalar] = {
    **ONE_THREAD,
    **{"lora.rank": 8, "lora.alpha": 16.0},
    **{"data.held-out-fraction": 0.2, "data.max-held-out": 48},
}
FULL = Size(
    flat=_FLAT,
    rows_of_domain=300,
    parts={
        "domains": Part(12, 10, 240, 4, 128, rows=60),
        "institutes": Part(12, 10, 240, 4, 128),
        "speakers": Part(6, 10, 60, 4, 96),
    },
    rates=(3e-3, 1e-2),
    seeds=(0, 1, 2),
    recipe=Recipe(),
)
QUICK = Size(
    flat={**_FLAT, "data.max-held-out": 8},
    rows_of_domain=32,
    parts={
        "domains": Part(1, 3, 3, 4, 64),
        "institutes": Part(1, 3, 3, 4, 64),
        "speakers": Part(1, 3, 3, 4, 48, clients=8),
    },
    rates=(1e-2,),
    seeds=(0,),
    recipe=Recipe(steps=100),
)
# On a GPU; a part is some 8 million tokens, by two timings under six minutes. Not yet done in full on one.
SMOLLM2 = Size(
    flat={**_FLAT, **{"model.device": "cuda", "model.dtype": "bfloat16", "model.num-threads": "auto"}},
    rows_of_domain=800,
    parts={
        "domains": Part(4, 10, 40, 8, 256, rows=60),
        "institutes": Part(4, 10, 40, 8, 256),
        "speakers": Part(3, 8, 24, 4, 128),
    },
    rates=(1e-3, 3e-3),
    seeds=(0, 1, 2),
)
# What two cores do in about three hours: one seed, a twentieth of the tokens.
SMOLLM2_ON_CPU = replace(
    SMOLLM2,
    flat={**_FLAT, "data.max-held-out": 12},
    rows_of_domain=240,
    parts={
        "domains": Part(3, 6, 18, 2, 160, rows=60),
        "institutes": Part(3, 6, 18, 4, 96),
        "speakers": Part(2, 5, 10, 2, 64, clients=24),
    },
    seeds=(0,),
)


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    """What can be asked for."""

    parts: Annotated[str, typer.Option(help="These parts only, separated by commas.")] = ""
    rows: Annotated[int, typer.Option(min=0, help="Each domain trains on; 0 = as the size says.")] = 0


def rows_by_part(options: Options, corpus: Corpus) -> Iterator[tuple[str, list[Row]]]:
    """Yield the name of each part that is wanted, and its rows with their owner as `client`."""
    found = {"domains": [{**row, "client": row["domain"]} for row in corpus.rows]}
    if (options.data / INSTITUTES).is_file():
        rows = read_local_rows(str(options.data / INSTITUTES)).rows
        # All have the same instruction, which tells nothing.
        found["institutes"] = [
            {"prompt": row["input"], "response": row["output"], "client": row["client"]} for row in rows
        ]
    if (options.data / SPEAKERS).is_file():
        found["speakers"] = list(read_local_rows(str(options.data / SPEAKERS)).rows)
    wanted = [name.strip() for name in options.parts.split(",") if name.strip()]
    yield from ((name, rows) for name, rows in found.items() if name in wanted or not wanted)


def study_of(name: str, part: Part, rows: list[Row], model: str, size: Size, work: Path) -> Study:
    """Return the study of a part."""
    flat: dict[str, Scalar] = {
        **size.flat,
        "run.name": name,
        "model.name": model,
        "data.source": str(write_rows(work / f"{name}.jsonl", rows)),
        "data.partition": "column:client",
        "federation.num-clients": part.clients or len({row["client"] for row in rows}),
        "federation.num-rounds": part.rounds,
        "train.local-steps": part.steps,
        "personal.mode": "finetune",
        "personal.steps": part.home,
        "train.batch-size": part.batch_size,
        "train.max-length": part.max_length,
    }
    if part.rows:
        held_out = int(size.flat["data.max-held-out"])
        together = part.rows + held_out
        flat |= {"data.max-rows": together, "data.held-out-fraction": held_out / together}
    return Study(name, RunConfig.from_flat(flat), METHODS, size.rates, size.seeds)


def goals_of(parts: Mapping[str, Summary]) -> dict[str, Goal]:
    """Return the goals of every part: who gains, and that the text of others is never worse than alone."""
    goals: dict[str, Goal] = {}
    for name, result in parts.items():
        home, shared = (result["summary"][method] for method in ("home", "federated"))
        goals |= {
            f"{name}_gained_at_own_best": Goal(home["gained_over_alone"], GOAL),
            f"{name}_gained_at_equal_tokens": Goal(home["at_equal_tokens"]["gained_over_alone"], GOAL),
            f"{name}_shared_no_worse_on_others": Goal(shared["others"]["no_worse_than_alone"], 1.0),
        }
    return goals


def main(options: Options) -> None:
    """Do the experiment, print and keep its figures."""
    console = open_console(options)
    embedded = SMOLLM2 if torch.cuda.is_available() else SMOLLM2_ON_CPU
    size = size_of(options, full=FULL, quick=QUICK, embedded=embedded)
    jobs = 0 if size is SMOLLM2 else options.processes  # 0 = as many as there is room for: on a GPU one
    work, parts = work_folder(options, "joining"), dict[str, Summary]()
    corpus = text_of(options, size, console)
    model, described = model_of(options.model, size.recipe, corpus, console)
    numbers = dict(size.parts)
    if options.rows:
        numbers["domains"] = replace(numbers["domains"], rows=options.rows)
    for name, rows in rows_by_part(options, corpus):
        study = study_of(name, numbers[name], rows, model, size, work)
        parts[name] = do_in(work / name, study, jobs, partial(console.print, soft_wrap=True))
        for table in study_tables(parts[name]):
            console.print(table)
        for line in findings(parts[name]):
            console.print(line, soft_wrap=True)
    settings = {
        "quick": options.quick,
        "flat": dict(size.flat),
        "parts": {name: vars(numbers[name]) for name in parts},
        "rates": size.rates,
        "seeds": size.seeds,
    }
    shared = {"environment": environment(PACKAGES), "model": described, "settings": settings}
    publish(options, "joining", {**shared, "parts": parts}, goals_of(parts))
