"""What the experiments share: their options, and the place where their cells are done."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

from fedllm.config.key import Scalar
from fedllm.models.files import fingerprint, resolve_model
from scripts.benchmarks.tools import environment
from scripts.experiments.cells import Figures, Kinds, Setting, Workshop
from scripts.experiments.corpus import Corpus, grouped, left_out_packages, write_rows
from scripts.experiments.small_model import Recipe, small_model

PACKAGES = ("fedllm", "flwr", "torch", "transformers", "peft", "tokenizers", "numpy")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SMALL, EMBEDDED = "small", "smollm2-135m-instruct"
ONE_THREAD: dict[str, Scalar] = {"model.device": "cpu", "model.num-threads": 1}
S = TypeVar("S")


def experiment_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every experiment has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=(SMALL, EMBEDDED), default=SMALL)
    parser.add_argument("--quick", action="store_true", help="a tiny grid; under 3 minutes on two cores")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the seven instruction domains")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs") / name,
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
    return parser


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Return the options of the command line, or end the program with what is wrong with them."""
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: expected at least 1")
    return options


def scale_of(options: argparse.Namespace, *, full: S, quick: S, embedded: S) -> S:
    """Return the scale that the options ask for; the embedded model has one only."""
    if options.model == EMBEDDED:
        return embedded
    return quick if options.quick else full


def open_workshop(
    options: argparse.Namespace,
    corpus: Corpus,
    flat: Mapping[str, Scalar],
    kinds: Kinds,
    notice: Callable[[str], None],
    pool: Executor | None,
    *,
    recipe: Recipe | None,
    clients: Sequence[int] = (),
) -> tuple[Workshop, Figures]:
    """Return where cells are done, and what the studies share as figures; makes the small model if needed.

    `recipe` is that of the small model, None for the model that is named; `clients` are the numbers K of
    clients for which the rows get a column `group-K`.

    Raises:
        FedLLMError: the text or the model cannot be had.
    """
    model, described = _model(options.model, recipe, corpus, notice)
    rows_file = write_rows(options.work / f"rows-{corpus.digest[:16]}.jsonl", grouped(corpus, clients))
    digest = f"{fingerprint(resolve_model(model).folder)} {corpus.digest}"
    machine = environment(PACKAGES)
    journal = options.work / "cells.jsonl"
    if options.fresh:
        journal.unlink(missing_ok=True)
    shared = {
        "environment": machine,
        "model": described,
        "text": {"name": corpus.name, "rows": len(corpus.rows), "digest": corpus.digest},
    }
    setting = Setting(model, rows_file, flat, digest)
    return Workshop(setting, kinds, journal, machine["commit"], pool, notice), shared


def _model(
    name: str, recipe: Recipe | None, corpus: Corpus, notice: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """Return `model.name` and what the report says about the model."""
    if recipe is None:
        return name, {"name": name}
    notice("the small model: made once on this machine, in a minute or two")
    made = small_model(recipe, left_out=left_out_packages(corpus))
    notice(f"{made.parameters:,} parameters, held-out loss {made.held_out_loss:.3f} nats per token")
    figures = {
        "parameters": made.parameters,
        "trained_tokens": made.trained_tokens,
        "held_out_loss": made.held_out_loss,
        "uniform_loss": made.uniform_loss,
    }
    return str(made.folder), {"name": name, **figures}
