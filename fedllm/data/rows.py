"""Reads a data source, as a person names it, into rows that remember their file and line."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedllm.data.demo_corpus import docstring_rows
from fedllm.data.fields import BadRow
from fedllm.data.find_files import ACCEPTED, GLOB_CHARACTERS, find_files
from fedllm.data.formats import READERS, check_content
from fedllm.errors import ConfigError, DataError

DOCSTRINGS = "docstrings"

_Located: TypeAlias = tuple[str, int, dict[str, Any] | str]

_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w.-]+))?(:(?P<configuration>[\w.-]+))?")


@dataclass(frozen=True)
class Rows:
    """The usable rows of a source; `origins[i]` is the file and line that `rows[i]` starts on."""

    rows: tuple[dict[str, Any], ...]
    origins: tuple[tuple[str, int], ...]
    files: tuple[str, ...]
    bad: tuple[BadRow, ...]


def read_rows(
    source: str,
    *,
    split: str = "train",
    on_bad_row: str = "skip",
    num_packages: int = 8,
    licences: frozenset[str] = frozenset(),
) -> Rows:
    """Read every row of `source`.

    Args:
        source: `docstrings`; a file of a known kind (`READERS`); a folder of them; a glob; several of
            these separated by commas; or else the id of a Hugging Face data set, `id:configuration` where
            it has several, `id@revision:configuration` for one commit of it. What looks like a path (a
            known extension, glob characters, a leading `/`, `.` or `~`) or exists is never looked up on the
            hub.
        split: the split of a hub data set, or of a folder whose files are named as splits.
        on_bad_row: `skip` collects bad rows in `Rows.bad`; `stop` raises at the first.
        num_packages: how many installed packages `docstrings` is read from.
        licences: those that they may have; none allow any. Rows of other sources are not looked at.

    Raises:
        ConfigError: `on_bad_row` is neither of the two.
        DataError: nothing is there, a file cannot be read, or a row is bad under `stop`.
    """
    if source == DOCSTRINGS:
        corpus = docstring_rows(num_packages, licences=licences)
        located: Iterable[_Located] = ((DOCSTRINGS, number, row) for number, row in enumerate(corpus, 1))
        return _collect(located, (DOCSTRINGS,), on_bad_row)
    if is_local(source):
        return read_local_rows(source, split=split, on_bad_row=on_bad_row)
    return _collect(_hub_rows(source, split), (source,), on_bad_row)


def read_local_rows(source: str, *, split: str = "train", on_bad_row: str = "skip") -> Rows:
    """Read local files as `read_rows` does, and never the hub: for text whose very name may be private.

    Raises:
        ConfigError: `on_bad_row` is neither `skip` nor `stop`.
        DataError: nothing is there, a file cannot be read, or a row is bad under `stop`.
    """
    files = find_files(source, split)
    return _collect((item for file in files for item in _file_rows(file)), files, on_bad_row)


def is_local(source: str) -> bool:
    """Return whether `source` names local files rather than a hub data set."""
    return (
        source.startswith(("/", ".", "~"))
        or any(suffix.lower() in READERS for suffix in Path(source).suffixes)  # also rows.jsonl.gz
        or GLOB_CHARACTERS.search(source) is not None
        or os.path.exists(source)
        or (hub := _HUB_ID.fullmatch(source)) is None  # commas, spaces and deeper paths are no hub id either
        or os.path.exists(hub["id"])
    )


def bad_row_error(bad: BadRow) -> DataError:
    """Return the error that reports `bad` where bad rows are not skipped."""
    return DataError(
        f"{bad.file}, line {bad.line}: {bad.reason}; mend the row or set data.on-bad-row to skip"
    )


def _file_rows(file: str) -> Iterator[_Located]:
    try:
        check_content(file)
        for line, row in READERS[Path(file).suffix.lower()](file):
            yield file, line, row
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise DataError(f"{file}: cannot be read ({why}); check the file and its permissions") from None


def _hub_rows(source: str, split: str) -> Iterator[_Located]:
    import datasets

    name = _HUB_ID.fullmatch(source)
    assert name is not None  # is_local sent everything else elsewhere
    if _is_local_reader(name["id"]):  # it would read whatever lies in the working directory
        raise DataError(f"data.source = {source!r}: no data set but a reader of local files; name the files")
    try:
        # With this prefix it is the hub and nothing else: without, a folder of that name here would be read.
        path, pinned = f"hf://datasets/{name['id']}", name["revision"]
        loaded = datasets.load_dataset(path, name["configuration"], split=split, revision=pinned)
        for number, row in enumerate(loaded, 1):
            yield source, number, dict(row)
    except _hub_errors() as error:  # the message of a parser may quote a row, so only its kind is told
        raise DataError(
            f"{source}: no such file, and no Hugging Face data set with split {split!r} could be read "
            f"({type(error).__name__}); check the network, data.split and id:configuration, "
            f"or name local {ACCEPTED}"
        ) from None


def _hub_errors() -> tuple[type[Exception], ...]:
    """Return what `datasets` raises where a data set cannot be reached, found or parsed."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    usual = (OSError, ValueError, RuntimeError, LookupError, ImportError)
    return (*usual, DatasetsError, HTTPError, EntryNotFoundError)


def _is_local_reader(name: str) -> bool:
    """Return whether `datasets` takes a name for every file of a kind below the working directory: "json"."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return name in _PACKAGED_DATASETS_MODULES


def _collect(located: Iterable[_Located], files: tuple[str, ...], on_bad_row: str) -> Rows:
    if on_bad_row not in {"skip", "stop"}:
        raise ConfigError(f"data.on-bad-row = {on_bad_row!r}: expected one of skip, stop")
    rows: list[dict[str, Any]] = []
    origins: list[tuple[str, int]] = []
    bad: list[BadRow] = []
    for file, line, row in located:
        if isinstance(row, dict):
            rows.append(row)
            origins.append((file, line))
        else:
            bad.append(BadRow(file, line, row))
            if on_bad_row == "stop":
                raise bad_row_error(bad[-1])
    return Rows(tuple(rows), tuple(origins), files, tuple(bad))
