"""The rows that the benchmark of a client compares on: short ones, long ones, full ones and uneven ones."""

import ast
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.tokens import hosted_rows
from fedllm.config.keys import DataConfig
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Example, Turn
from fedllm.data.installed_packages import installed_packages, source_files
from fedllm.data.shards import load_one_client
from fedllm.errors import DataError
from scripts.benchmarks.workloads import SHORT, UNEVEN, Bench, Shape

DEFAULT_ROWS, UNEVEN_ROWS = "first sentences", "uneven"
INSTRUCTIONS = ("general.train.jsonl", "medical.train.jsonl")  # the first that a folder holds is used


@dataclass(frozen=True, eq=False)
class Rows:
    """Where a workload's rows come from, and how many of them are trained on how."""

    source: str
    examples: Sequence[Example]
    shape: Shape = SHORT


def first_sentences(bench: Bench) -> list[Example]:
    """Return the client's rows of fedllm's default source: a signature, a docstring's first sentence.

    Raises:
        DataError: the source has no such client.
    """
    config = RunConfig(seed=bench.seed)
    clients = {rows.client_id: rows.train for rows in hosted_rows(config, {})}
    if bench.client_id not in clients:
        raise DataError(f"--client {bench.client_id}: expected one of {', '.join(sorted(clients))}")
    return list(clients[bench.client_id])


def whole_docstrings(bench: Bench, most: int = 400) -> list[Example]:
    """Return rows of the same package whose answers are whole docstrings: longer, and more of them learnt."""
    package = next(package for package in installed_packages() if package.name == bench.client_id)
    examples: list[Example] = []
    for file in source_files(package):
        examples += _documented_functions(file)
        if len(examples) >= most:
            break
    return examples[:most]


def full_rows(bench: Bench) -> list[Example]:
    """Return docstrings as plain text, longer than a row: nothing to pad, every token learnt.

    What is left of the difference is the base model kept and the forward pass not repeated.
    """
    tokenizer, most = bench.engine.base.tokenizer, SHORT.max_length
    texts = (example.turns[-1].content for example in whole_docstrings(bench, 4000))
    return [Example(text=text) for text in texts if len(tokenizer(text)["input_ids"]) >= most]


def instructions(folder: Path, seed: int) -> tuple[str, list[Example]]:
    """Return the name of the first file of `INSTRUCTIONS` in `folder`, and its rows.

    Raises:
        DataError: it holds none of them, or the file cannot be read.
    """
    file = next((folder / name for name in INSTRUCTIONS if (folder / name).is_file()), None)
    if file is None:
        raise DataError(f"--data {folder}: holds neither {' nor '.join(INSTRUCTIONS)}")
    shard = load_one_client(file, DataConfig(), client_id="bench", seed=seed)
    return file.name, list(shard.client.train)


def kinds_of_rows(bench: Bench, data: Path | None, *, quick: bool) -> dict[str, Rows]:
    """Return the rows to compare on, by name: all but the default ones are left out with `quick`.

    Raises:
        DataError: the default source has no such client, or `data` holds no instructions.
    """
    docstrings = f"docstrings of {bench.client_id}"
    default = Rows(docstrings, first_sentences(bench))
    if quick:
        return {DEFAULT_ROWS: default}
    whole = whole_docstrings(bench)
    uneven = Rows(docstrings, whole, UNEVEN)
    if data is not None:
        uneven = Rows(*instructions(data, bench.seed), UNEVEN)
    return {
        DEFAULT_ROWS: default,
        "whole docstrings": Rows(docstrings, whole),
        "full rows": Rows(docstrings, full_rows(bench)),
        UNEVEN_ROWS: uneven,
    }


def _documented_functions(file: Path) -> Iterator[Example]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # other people's "\d"
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # a template, or another version's Python
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            prompt = f"def {node.name}({ast.unparse(node.args)})"
            yield Example(turns=(Turn("user", prompt), Turn("assistant", docstring)))
