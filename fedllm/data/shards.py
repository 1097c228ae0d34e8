"""Deals a data source to one shard per client, and fixes the order in which a client draws its rows."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fedllm.config.key import number_or
from fedllm.config.keys import DataConfig
from fedllm.data.fields import (
    BadRow,
    ClientRows,
    Example,
    RowProblem,
    count_reasons,
    detect_fields,
    mapped_columns,
    to_example,
)
from fedllm.data.licences import is_licensed, parse_licences
from fedllm.data.partition import Partition, make_partition, parse_partition, partition_rows, row_label
from fedllm.data.rows import Rows, bad_row_error, read_local_rows, read_rows
from fedllm.errors import DataError, NoDataError, RowsLostError
from fedllm.seeds import derive_seed

MOST_LOST = 0.2  # share of rows that may be of no use; beyond it something is wrong with them or the settings
Place: TypeAlias = tuple[str, int]  # the file and line that a row begins on

_logger = logging.getLogger("fedllm.data")
_DEFAULT_PACKAGES = 8  # of the docstrings corpus where packages are not the clients


@dataclass(frozen=True)
class Shards:
    """All clients of a run on one machine; `partition` counts usable rows only, in reading order."""

    clients: tuple[ClientRows, ...]
    bad: tuple[BadRow, ...]
    partition: Partition


@dataclass(frozen=True)
class ClientShard:
    """The rows of the one client that this machine holds, and its rows that cannot be used."""

    client: ClientRows
    bad: tuple[BadRow, ...]


@dataclass(frozen=True)
class OwnSplit:
    """How a data holder splits its rows itself, whatever a run says.

    `held_out` is given the places of all rows and returns those that are held out. Where `hides`, no number
    and no failure follows from what a row says: a row that is of no use counts as one that says nothing.
    """

    held_out: Callable[[Sequence[Place]], Set[Place]]
    hides: bool = False


@dataclass(frozen=True)
class _Usable:
    rows: tuple[dict[str, Any], ...]
    examples: tuple[Example, ...]
    places: tuple[Place, ...]
    bad: tuple[BadRow, ...]


def load_shards(data: DataConfig, *, num_clients: int, seed: int) -> Shards:
    """Read `data.source` and deal it to `num_clients` clients, each with its held-out rows set apart.

    Raises:
        ConfigError: the partition or the column mapping is malformed or does not fit the rows.
        DataError: the source cannot be read, has no known columns, or holds a bad row under `stop`.
        NoDataError: the source has no usable row.
        RowsLostError: more than `MOST_LOST` of them cannot be used.
    """
    spec = parse_partition(data.partition)
    num_packages = num_clients if spec.form == "column" else min(num_clients, _DEFAULT_PACKAGES)
    rows = read_rows(
        data.source,
        split=data.split,
        on_bad_row=data.on_bad_row,
        num_packages=num_packages,
        licences=parse_licences(data.licences),
    )
    usable = _usable(data.source, rows, data, spec.column)
    dealt = partition_rows(usable.rows, data.partition, num_clients=num_clients, seed=seed)
    if spec.form == "column":
        _tell_clients(dealt, usable.rows, spec.column)
    owned = [[usable.examples[index] for index in indices] for indices in dealt.indices]
    clients = (
        _client_rows(examples, data, client_id, seed)
        for client_id, examples in zip(dealt.client_ids, owned, strict=True)
    )
    partition = make_partition(dealt.client_ids, dealt.indices, dealt.values, map(examples_digest, owned))
    return Shards(tuple(clients), usable.bad, partition)


def load_one_client(path: str | Path, data: DataConfig, *, client_id: str, seed: int) -> ClientShard:
    """Read local files that belong whole to `client_id`; `data.source` and `data.partition` are not used.

    Raises:
        ConfigError: the column mapping is malformed.
        DataError: the files cannot be read, have no known columns, or hold a bad row under `stop`.
        NoDataError: the files have no usable row.
        RowsLostError: more than `MOST_LOST` of them cannot be used.
    """
    rows = read_local_rows(str(path), split=data.split, on_bad_row=data.on_bad_row)
    usable = _usable(str(path), rows, data, "")
    client, number = _client_rows(usable.examples, data, client_id, seed), len(usable.examples)
    if number_or(data.max_rows, number) >= number:  # else they stand next to a few of the others
        client = replace(client, num_bad=len(usable.bad))
    return ClientShard(client, usable.bad)


def load_split_rows(
    path: str | Path, data: DataConfig, *, client_id: str, seed: int, split: OwnSplit
) -> ClientShard:
    """Read local files of `client_id`, which splits them itself; raises as `load_one_client`.

    A row is known by the file and line it begins on, so neither another row nor the columns that a run reads
    move it to the other side. Of `data.max_rows` the run's seed draws from the training rows alone.
    """
    if split.hides:
        data = replace(data, on_bad_row="skip")
    rows = read_local_rows(str(path), split=data.split, on_bad_row=data.on_bad_row)
    places = [*rows.origins, *((bad.file, bad.line) for bad in rows.bad)]
    held_out = split.held_out(places)
    kept = sorted(place for place in places if place not in held_out)
    if len(kept) > (most := number_or(data.max_rows, len(kept))):
        kept = [kept[index] for index in _permutation(len(kept), seed, "max-rows", client_id)[:most]]
    try:
        usable = _usable(str(path), rows, data, "", most_lost=1.0 if split.hides else MOST_LOST)
    except DataError:
        if not split.hides or not places:
            raise
        usable = _Usable((), (), (), rows.bad)
    chosen, named = set(kept), list(zip(usable.places, usable.examples, strict=True))
    train = tuple(example for place, example in named if place in chosen)
    learnt = set(train)  # the loss of a copy would be a test of memory
    measured = (example for place, example in named if place in held_out and example not in learnt)
    num_public = len(kept) if split.hides else None
    client = ClientRows(client_id, train, tuple(measured), len(usable.bad), num_public)
    return ClientShard(client, usable.bad)


def draw_rows(num_rows: int, *, seed: int, client_id: str, start: int, count: int) -> tuple[int, ...]:
    """Return the rows a client draws next, after the `start` it has drawn so far in the run.

    Each pass over the rows is a permutation of its own, so all are seen before any is seen twice, and the
    answer depends on nothing but the arguments: a resumed run draws on as if never interrupted.

    Args:
        num_rows: the rows the client trains on.
        seed: the run's seed.
        client_id: the client, whose order is its own.
        start: rows drawn before, from 0.
        count: rows to draw.

    Returns:
        `count` indices below `num_rows`.

    Raises:
        NoDataError: `num_rows` is 0.
    """
    if num_rows == 0:
        raise NoDataError(f"client {client_id!r} has no row to train on; leave it out of the cohort")
    if min(num_rows, start, count) < 0:
        raise ValueError(f"negative argument: num_rows={num_rows}, start={start}, count={count}")
    first, last = start // num_rows, (start + count) // num_rows  # passes over the rows, from 0
    stream = np.concatenate(
        [_permutation(num_rows, seed, "epoch", client_id, epoch) for epoch in range(first, last + 1)]
    )
    offset = start - first * num_rows
    return tuple(int(index) for index in stream[offset : offset + count])


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 (hex) of what examples say, in their order."""
    hasher = hashlib.sha256()
    for example in examples:  # JSON, so that no other examples give the same bytes
        turns = [(turn.role, turn.content) for turn in example.turns]
        hasher.update(json.dumps([example.text, turns]).encode())
    return hasher.hexdigest()


def _permutation(length: int, seed: int, *names: str | int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *names))).permutation(length)


def _usable(
    source: str, rows: Rows, data: DataConfig, partition_column: str, *, most_lost: float = MOST_LOST
) -> _Usable:
    """Return the rows that become examples; raises as `load_shards` where none or too few do."""
    if not rows.rows:
        raise _nothing_usable(source, rows.bad)
    present = dict.fromkeys(name for row in rows.rows for name in row)
    # A table keeps columns that nothing uses, such as a null "messages" next to prompts and responses.
    filled = [name for name in present if any(row.get(name) is not None for row in rows.rows)]
    try:
        fields = detect_fields(filled, mapped_columns(data.columns))
    except DataError:
        fields = detect_fields(present, mapped_columns(data.columns))
    # A column that no row has is a wrong setting, which partition_rows reports, not a file of bad rows
    labelled = partition_column and any(row_label(row, partition_column) for row in rows.rows)
    kept: list[tuple[dict[str, Any], Example, Place]] = []
    bad: list[BadRow] = []
    licences, num_refused = parse_licences(data.licences), 0
    for row, (file, line) in zip(rows.rows, rows.origins, strict=True):
        if not is_licensed(row, licences):
            num_refused += 1
            continue
        try:
            example = to_example(row, fields)
            if labelled and row_label(row, partition_column) is None:
                raise RowProblem(f"column {partition_column!r}, which parts the rows, has no value")
        except RowProblem as problem:
            bad.append(BadRow(file, line, str(problem)))
            if data.on_bad_row == "stop":
                raise bad_row_error(bad[-1]) from None
            continue
        kept.append((row, example, (file, line)))
    bad = [*rows.bad, *bad]
    if num_refused:  # it is no fault of theirs, so they count as no bad rows
        _logger.warning(
            "%s: %d of %d rows are not used, as data.licences does not allow their licence",
            *(source, num_refused, len(rows.rows)),
        )
    if not kept:
        raise _nothing_usable(source, bad, num_refused)
    if len(bad) > most_lost * (len(kept) + len(bad)):
        raise RowsLostError(
            f"{source}: {len(bad)} of {len(kept) + len(bad)} rows cannot be used, more than {MOST_LOST:.0%}:"
            f" {count_reasons(bad)}; mend them or take them out"
        )
    used, examples, places = zip(*kept, strict=True)
    return _Usable(used, examples, places, tuple(bad))


def _tell_clients(partition: Partition, rows: Sequence[dict[str, Any]], column: str) -> None:
    """Log how many values of the column are no client, and how many are one by another name."""
    num_values, num_clients = len({row_label(row, column) for row in rows}), len(partition.client_ids)
    if num_values > num_clients:
        num_left = len(rows) - sum(map(len, partition.indices))
        _logger.warning(
            "federation.num-clients = %d: %d of the %d clients of column %r are left out, with %d of %d rows",
            *(num_clients, num_values - num_clients, num_values, column, num_left, len(rows)),
        )
    if partition.values:
        _logger.warning(
            "%d clients have a name other than their value of column %r; fedllm check shows both",
            *(len(partition.values), column),
        )


def _nothing_usable(source: str, bad: Sequence[BadRow], num_refused: int = 0) -> NoDataError:
    if num_refused:
        return NoDataError(
            f"{source}: data.licences allows none of its rows that can be used; name their licences in a"
            " column `licence`, or allow others"
        )
    if not bad:
        return NoDataError(f"{source}: holds no rows; name a source that does")
    return NoDataError(
        f"{source}: none of its {len(bad)} rows can be used: {count_reasons(bad)}; check the file and"
        " data.columns"
    )


def _client_rows(examples: Sequence[Example], data: DataConfig, client_id: str, seed: int) -> ClientRows:
    if len(examples) > (most := number_or(data.max_rows, len(examples))):
        drawn = _permutation(len(examples), seed, "max-rows", client_id)[:most]
        examples = [examples[index] for index in sorted(drawn)]
    order = _permutation(len(examples), seed, "held-out", client_id)
    chosen = {int(index) for index in order[: _held_out_count(len(examples), data)]}
    held_out = [example for index, example in enumerate(examples) if index in chosen]
    memorised = set(held_out)  # a copy left in train would make the held-out loss a test of memory
    train = [example for example in examples if example not in memorised]
    if not train:  # every row is a copy of another: rather train unmeasured than not at all
        train, held_out = list(examples), []
    return ClientRows(client_id, tuple(train), tuple(held_out))


def _held_out_count(num_rows: int, data: DataConfig) -> int:
    if num_rows < 2 or data.held_out_fraction == 0:
        return 0
    wanted = max(1, round(data.held_out_fraction * num_rows))
    return min(wanted, data.max_held_out, num_rows - 1)  # one row at least is left to train on
