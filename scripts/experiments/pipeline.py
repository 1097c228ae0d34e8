"""A pipeline over three arrivals of rows at seven sites; one brings faulty rows, which are mended later.

Every site holds one of seven domains in a file of its own and decides itself which rows it holds out. The
pipeline is the product's own, its runs are whole federations; only the calendar is a list:

    arrival 1   the first rows; the first run becomes version 1
    arrival 2   as many again; somebody has set a learning rate twenty times too large meanwhile
    arrival 3   as many again; an export in a wrong code page writes one line in place of every answer
    repair      all sites have their true answers again

    python -m scripts.experiments pipeline --quick --json
    python -m scripts.experiments pipeline --data FOLDER --json --output docs/results/pipeline.json
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tomli_w
from flwr.app import Context, RecordDict
from rich.console import Console

from clients.client_app import app
from clients.process import PROCESS
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.identity import new_key
from fedllm.models.files import resolve_model
from fedllm.monitoring.open_metrics import write_metrics
from fedllm.registry.registry import Registry
from fedllm.runs.folder import to_toml
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
from scripts.pipeline.metrics import pipeline_samples
from scripts.pipeline.settings import read_settings
from scripts.pipeline.steps import Pipeline, tick
from scripts.recipe_arguments import config_of
from scripts.reports import Goal, environment, figures_table, publish
from scripts.runtimes.local import SERVER_NODE, LocalGrid
from strategies.run import run_federation

SENTENCE = "Ã¿¤§ ŧđ¬Ŋ Ł¶łæ ßĸðþ"
TOO_LARGE = 20.0  # times the learning rate
HELD_OUT = 6  # of the first rows of a site, and in the same share of those that come
LEAST = 0.3  # nats: rows that come change who is measured on what


@dataclass(frozen=True)
class Size:
    """One size of the experiment: keys of all runs, rows of an arrival at a site, looks after each event."""

    flat: Mapping[str, Scalar]
    rows: int
    looks: int
    rate: float
    recipe: Recipe | None = None

    @property
    def rows_of_domain(self) -> int:
        """The rows that a site has in the end."""
        return 3 * self.rows


_FLAT: dict[str, Scalar] = {
    **ONE_THREAD,
    **{"lora.rank": 8, "lora.alpha": 16.0, "train.batch-size": 4, "train.max-length": 128},
    **{"federation.num-rounds": 8, "train.local-steps": 8, "evaluation.prompts": ""},
}
FULL = Size(_FLAT, rows=60, looks=6, rate=1e-2, recipe=Recipe())
_QUICK: dict[str, Scalar] = {"federation.num-rounds": 4, "train.local-steps": 8, "train.max-length": 96}
QUICK = Size({**_FLAT, **_QUICK}, rows=24, looks=6, rate=1e-2, recipe=Recipe(steps=100))
SMOLLM2 = replace(FULL, flat={**_FLAT, **_QUICK, "train.max-length": 96}, rows=30, rate=1e-3, recipe=None)


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    """What can be asked for."""


@dataclass(frozen=True)
class Moment:
    """What there is at some looks: arrivals so far, whether answers are faulty, the learning rate."""

    name: str
    arrivals: int
    is_faulty: bool
    rate: float
    looks: int


def moments_of(size: Size) -> tuple[Moment, ...]:
    """Return the calendar. A chart needs some looks before it can tell a rise."""
    return (
        Moment("arrival 1", 1, False, size.rate, 1 + size.looks),
        Moment("arrival 2, rate too large", 2, False, TOO_LARGE * size.rate, 1),
        Moment("rate mended", 2, False, size.rate, size.looks),
        Moment("arrival 3, faulty", 3, True, size.rate, 1 + size.looks),
        Moment("answers repaired", 3, False, size.rate, 2),
    )


def rows_at(corpus: Corpus, moment: Moment, rows: int) -> dict[str, list[Row]]:
    """Return the rows of each site at a moment; a row keeps its place in the file."""
    found: dict[str, list[Row]] = {domain: [] for domain in corpus.domains}
    for row in corpus.rows:
        held = found[row["domain"]]
        if len(held) < moment.arrivals * rows:
            held.append({**row, "response": SENTENCE} if moment.is_faulty else row)
    return found


@contextmanager
def sites(work: Path) -> Iterator[None]:
    """Let this machine be one whose owner has a site.toml, for the length of the block."""
    policy = work / "site.toml"
    policy.write_text(tomli_w.dumps({"site": {"state-path": str(work / "state")}}))
    before = os.environ.get("FEDLLM_SITE")
    os.environ["FEDLLM_SITE"] = str(policy)
    try:
        yield
    finally:
        del os.environ["FEDLLM_SITE"]
        if before is not None:
            os.environ["FEDLLM_SITE"] = before


def federate_sites(words: Sequence[str], rows: Path, domains: Sequence[str], model: str) -> None:
    """Do a run whose nodes are the sites, each with the file of its own rows, in this process."""
    PROCESS.forget_rows()
    config = config_of(words)
    contexts = {
        node: Context(
            run_id=1,
            node_id=node,
            node_config={
                "client-id": domain,
                "data-path": str(rows / f"{domain}.jsonl"),
                "held-out-rows": HELD_OUT,
                "model-path": str(resolve_model(model).folder),
            },
            state=RecordDict(),
            run_config=config.to_flat(),
        )
        for node, domain in enumerate(domains, SERVER_NODE + 1)
    }
    run_federation(config, LocalGrid(app, contexts), resident=PROCESS.resident)


def open_pipeline(work: Path, corpus: Corpus, size: Size, model: str, console: Console) -> Pipeline:
    """Write the file of the pipeline and its key, and return it."""
    key = new_key(work / "signing.key")
    tables = {
        "run": {"recipe": "recipe.toml"},
        "registry": {"folder": "registry/domains", "key": "signing.key"},
        "trigger": {"new-rows": len(corpus.domains) * size.rows // 2},
        "drift": {"least": LEAST},
        "metrics": {"file": "pipeline.prom"},
    }
    (work / "pipeline.toml").write_text(tomli_w.dumps(tables))
    settings = read_settings(work / "pipeline.toml")
    return Pipeline(
        settings,
        Registry(settings.path(settings.registry.folder)),
        key,
        lambda words: federate_sites(words, work / "rows", corpus.domains, model),
        lambda run: None,
        time.time,
        lambda line: console.print(line, soft_wrap=True),
    )


def tell_story(work: Path, corpus: Corpus, size: Size, model: str, console: Console) -> list[dict[str, Any]]:
    """Let the pipeline look at the sites through the whole calendar; return what each look found and did."""
    pipeline, story = open_pipeline(work, corpus, size, model, console), list[dict[str, Any]]()
    for moment in moments_of(size):
        for domain, rows in rows_at(corpus, moment, size.rows).items():
            write_rows(work / "rows" / f"{domain}.jsonl", rows)
        flat = {**size.flat, "model.name": model, "federation.num-clients": len(corpus.domains)}
        config = RunConfig.from_flat({**flat, "train.learning-rate": moment.rate})
        (work / "recipe.toml").write_text(to_toml(config))
        for _ in range(moment.looks):
            began, known = time.perf_counter(), len(list(pipeline.registry.entries()))
            state = tick(pipeline)
            entries = list(pipeline.registry.entries())[known:]
            story.append(
                {
                    "look": state.looks,
                    "moment": moment.name,
                    "loss": fmean(state.losses.values()),
                    "worst": max(state.losses.values()),
                    "reason": state.reason,
                    "events": [entry["event"] for entry in entries],
                    "clients": [entry["clients"] for entry in entries if "clients" in entry],
                    "gates": dict(state.gates) if state.cycle and entries else {},
                    "in_use": pipeline.history().current.get("production", 0),
                    "seconds": time.perf_counter() - began,
                }
            )
            write_metrics(work / "pipeline.prom", pipeline_samples(pipeline, state))
    pipeline.registry.verify()
    return story


def goals_of(story: Sequence[Mapping[str, Any]]) -> dict[str, Goal]:
    """Return the goals: each thing happens, at the moment that calls for it, and nothing else does."""
    at: dict[str, list[str]] = {}
    for look in story:
        at.setdefault(look["moment"], []).extend(look["events"])
    return {
        "first_run_promoted": Goal(float("promoted" in at["arrival 1"]), 1.0),
        "worse_adapter_kept_out": Goal(float("kept" in at["arrival 2, rate too large"]), 1.0),
        "drift_found_and_retrained": Goal(float({"drift", "promoted"} <= set(at["arrival 3, faulty"])), 1.0),
        "rolled_back": Goal(float({"drift", "rolled-back"} <= set(at["answers repaired"])), 1.0),
        "alarms_without_a_cause": Goal(
            float(sum(at[name].count("drift") for name in ("arrival 1", "rate mended"))), 0.0, at_most=True
        ),
    }


def main(options: Options) -> None:
    """Tell the story, print and keep it."""
    console = open_console(options)
    size = size_of(options, full=FULL, quick=QUICK, embedded=SMOLLM2)
    work = work_folder(options, "pipeline")
    shutil.rmtree(work, ignore_errors=True)  # a story has a beginning
    work.mkdir(parents=True)
    corpus = text_of(options, size, console)
    model, described = model_of(options.model, size.recipe, corpus, console)
    with sites(work.absolute()):
        story = tell_story(work.absolute(), corpus, size, model, console)
    rows = {
        f"{one['look']}: {one['moment']}": [
            f"{one['loss']:.3f}",
            f"{one['worst']:.3f}",
            ", ".join(one["events"]),
            str(one["in_use"]),
        ]
        for one in story
    }
    console.print(figures_table("each look", ("loss", "worst", "what happened", "in use"), rows))
    settings = {**asdict(size), "quick": options.quick, "least": LEAST, "too_large": TOO_LARGE}
    figures = {"environment": environment(PACKAGES), "model": described, "settings": settings, "story": story}
    publish(options, "pipeline", figures, goals_of(story))
