"""What the experiments share: their options, their text and model, and who does their trials."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import typer
from rich.console import Console

from fedllm.config.key import Scalar
from fedllm.models.files import fingerprint, resolve_model
from scripts.charts import check_matplotlib
from scripts.command_line import Json, Output, Quick
from scripts.experiments.corpus import Corpus, grouped, left_out_packages, read_corpus, write_rows
from scripts.experiments.small_model import Recipe, small_model
from scripts.reports import environment
from scripts.studies.trials import Figures, Kinds, Setting, TrialRunner, open_pool

PACKAGES = ("fedllm", "flwr", "torch", "transformers", "peft", "tokenizers", "numpy")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
Models = Literal["small", "smollm2-135m-instruct"]
EMBEDDED = "smollm2-135m-instruct"
ONE_THREAD: dict[str, Scalar] = {"model.device": "cpu", "model.num-threads": 1}
S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """Options of every experiment; `work` is `runs/NAME` where none is given."""

    model: Annotated[Literal["small", "smollm2-135m-instruct"], typer.Option(help="The base model.")] = (
        "small"
    )
    quick: Quick = False
    data: Annotated[Path, typer.Option(help="Folder of the seven instruction domains.")] = SHARED
    work: Annotated[Path | None, typer.Option(help="Folder of finished trials.")] = None
    fresh: Annotated[bool, typer.Option("--fresh", help="Do trials again that were finished.")] = False
    processes: Annotated[int, typer.Option(min=1, help="Of one thread each.")] = min(2, os.cpu_count() or 1)
    plot: Annotated[Path | None, typer.Option(help="Draw plots into this folder; needs matplotlib.")] = None
    json: Json = False
    output: Output = None


class Size(Protocol):
    """How large an experiment is, as far as all of them say it."""

    @property
    def flat(self) -> Mapping[str, Scalar]:
        """The keys of all its runs."""

    @property
    def rows_of_domain(self) -> int:
        """The most rows of a domain."""

    @property
    def recipe(self) -> Recipe | None:
        """That of the small model; None for the model that is named."""


def size_of(options: ExperimentOptions, *, full: S, quick: S, embedded: S) -> S:
    """Return the size that the options ask for; the embedded model has one only."""
    if options.model == EMBEDDED:
        return embedded
    return quick if options.quick else full


def open_console(options: ExperimentOptions) -> Console:
    """Return where a person reads, which leaves stdout to JSON.

    Raises:
        MissingExtraError: plots are wanted and matplotlib is absent.
    """
    if options.plot:
        check_matplotlib()
    return Console(stderr=options.json, highlight=False, markup=False)


def text_of(options: ExperimentOptions, size: Size, console: Console) -> Corpus:
    """Return the clients' text.

    Raises:
        DataError: it cannot be read.
    """
    notice = partial(console.print, soft_wrap=True)
    return read_corpus(
        options.data, size.rows_of_domain, keep_instructions=size.recipe is None, notice=notice
    )


def work_folder(options: ExperimentOptions, name: str) -> Path:
    """Return the folder of finished trials."""
    return options.work or Path("runs") / name


@contextmanager
def open_runner(
    options: ExperimentOptions,
    name: str,
    size: Size,
    corpus: Corpus,
    kinds: Kinds,
    console: Console,
    *,
    clients: Sequence[int] = (),
) -> Iterator[tuple[TrialRunner, Figures]]:
    """Yield who does the trials, and what the studies share as figures; makes the small model if needed.

    `clients` are the numbers K of clients for which the rows get a column `group-K`.

    Raises:
        FedLLMError: the text or the model cannot be had.
    """
    work = work_folder(options, name)
    model, described = model_of(options.model, size.recipe, corpus, console)
    rows_file = write_rows(work / f"rows-{corpus.digest[:16]}.jsonl", grouped(corpus, clients))
    digest = f"{fingerprint(resolve_model(model).folder)} {corpus.digest}"
    machine = environment(PACKAGES)
    journal = work / "trials.jsonl"
    if options.fresh:
        journal.unlink(missing_ok=True)
    shared = {
        "environment": machine,
        "model": described,
        "text": {"name": corpus.name, "rows": len(corpus.rows), "digest": corpus.digest},
    }
    setting = Setting(model, str(rows_file), size.flat, digest)
    with open_pool(options.processes) as pool:
        notice = partial(console.print, soft_wrap=True)
        yield TrialRunner(setting, kinds, journal, machine["commit"], pool, notice), shared


def model_of(
    name: str, recipe: Recipe | None, corpus: Corpus, console: Console
) -> tuple[str, dict[str, Any]]:
    """Return `model.name` and what the report says about the model."""
    if recipe is None:
        return name, {"name": name}
    console.print("the small model: made once on this machine, in a minute or two")
    made = small_model(recipe, left_out=left_out_packages(corpus))
    console.print(f"{made.parameters:,} parameters, held-out loss {made.held_out_loss:.3f} nats per token")
    figures = {
        "parameters": made.parameters,
        "trained_tokens": made.trained_tokens,
        "held_out_loss": made.held_out_loss,
        "uniform_loss": made.uniform_loss,
    }
    return str(made.folder), {"name": name, **figures}
