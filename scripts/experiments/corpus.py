"""The text of the experiments: seven instruction domains, or where they are absent what packages say.

All trials of a run share one file of rows with the columns `prompt`, `response`, `domain`, `label` and
`group-K`, so that `data.source` and `data.partition` deal them as they deal anybody's rows.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedllm.data.demo_corpus import docstring_rows
from fedllm.data.fields import Example, RowProblem, detect_fields, to_example
from fedllm.data.rows import read_local_rows
from fedllm.errors import DataError

DOMAINS = ("code", "finance", "general", "korean_chat", "math", "medical", "news")

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """Rows of `prompt`, `response`, `domain` and `label` ("" where there is none), grouped by domain."""

    name: str
    rows: tuple[Row, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in alphabetical order."""
        return tuple(sorted({row["domain"] for row in self.rows}))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the rows."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()


def read_corpus(
    folder: Path, rows_of_domain: int, *, keep_instructions: bool, notice: Callable[[str], None]
) -> Corpus:
    """Return the shortest rows of the seven domains in `folder`, or docstrings of seven packages.

    Without `keep_instructions` a sentence that begins every question of a domain is left out: it tells
    nothing within the domain, and a small model's tokenizer spends a third of a row on it.

    Raises:
        DataError: neither can be read.
    """
    files = {domain: folder / f"{domain}.train.jsonl" for domain in DOMAINS}
    absent = [file.name for file in files.values() if not file.is_file()]
    if absent:
        notice(
            f"{folder} has no {absent[0]}: the clients are the docstrings of {len(DOMAINS)} packages instead;"
            " name the folder of the seven domains with --data"
        )
        return Corpus("docstrings", tuple(_docstring_rows(rows_of_domain)))
    rows: list[Row] = []
    for domain, file in files.items():
        found = _domain_rows(domain, file, keep_instructions)
        lengths = [len(row["prompt"]) + len(row["response"]) for row in found]
        shortest = sorted(range(len(found)), key=lengths.__getitem__)[:rows_of_domain]
        rows += [found[index] for index in sorted(shortest)]
    return Corpus("seven instruction domains", tuple(rows))


def left_out_packages(corpus: Corpus) -> frozenset[str]:
    """Return the packages that a model must not have read before it meets `corpus`."""
    return frozenset(corpus.domains) if corpus.name == "docstrings" else frozenset()


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSON lines and return the path.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); name another --work") from None
    return path


def grouped(corpus: Corpus, numbers_of_clients: Sequence[int]) -> list[Row]:
    """Return the rows with a column `group-K` for every K: K clients as unlike as the domains allow.

    Fewer clients than domains share neighbouring ones out; more cut every domain into K / D equal parts.

    Raises:
        ValueError: K is above the number D of domains and no multiple of it.
    """
    place = {domain: index for index, domain in enumerate(corpus.domains)}
    seen = dict.fromkeys(corpus.domains, 0)
    rows = []
    for row in corpus.rows:
        domain = row["domain"]
        groups = {
            f"group-{number}": _group(domain, place[domain], seen[domain], len(place), number)
            for number in numbers_of_clients
        }
        seen[domain] += 1
        rows.append({**row, **groups})
    return rows


def _group(domain: str, place: int, position: int, num_domains: int, num_clients: int) -> str:
    if num_clients <= num_domains:
        return f"group-{place * num_clients // num_domains:02d}"
    if num_clients % num_domains:
        raise ValueError(f"{num_clients} clients are no multiple of {num_domains} domains")
    return f"{domain}-{position % (num_clients // num_domains):02d}"


def _domain_rows(domain: str, file: Path, keep_instructions: bool) -> list[Row]:
    rows = read_local_rows(str(file)).rows
    instructions = {row.get("instruction") for row in rows}
    if len(instructions) == 1 and not keep_instructions:
        rows = tuple({**row, "instruction": row.get("input"), "input": ""} for row in rows)
    fields = detect_fields(dict.fromkeys(name for row in rows for name in row))
    found = []
    for row in rows:
        try:
            example = to_example(row, fields)
        except RowProblem:
            continue
        found.append(row_of(example, domain, str(row.get("label") or "")))
    if not found:
        raise DataError(f"{file}: no row can be used; check --data")
    return found


def row_of(example: Example, domain: str, label: str = "") -> Row:
    """Return a conversation of one question and its answer as a row."""
    question, answer = example.turns
    return {"prompt": question.content, "response": answer.content, "domain": domain, "label": label}


def _docstring_rows(rows_of_domain: int) -> list[Row]:
    counts: dict[str, int] = {}
    rows = []
    for row in docstring_rows(len(DOMAINS)):
        domain = row["client"]
        counts[domain] = counts.get(domain, 0) + 1
        if counts[domain] <= rows_of_domain:
            rows.append({"prompt": row["prompt"], "response": row["response"], "domain": domain, "label": ""})
    return rows
