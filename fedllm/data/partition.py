"""Deals rows to clients: by a column, evenly, with skewed labels or with skewed sizes.

Drawing uses numpy's PCG64 on streams derived from the run's seed, so every process that holds the same rows
deals them alike; the digest lets two processes check that they did.
"""

import hashlib
import heapq
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.data.fields import name_columns
from fedllm.errors import ConfigError, DataError, IntegrityError
from fedllm.files import write_file
from fedllm.seeds import derive_seed

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FORMS = "column:NAME, iid, dirichlet:NAME:ALPHA (ALPHA > 0) or quantity:SKEW (SKEW > 0)"


@dataclass(frozen=True)
class Partition:
    """`indices[i]` are the rows, ascending, of `client_ids[i]`; no row has two owners.

    `contents[i]` is the SHA-256, in hexadecimal, of what those rows say, where they have been read.
    """

    client_ids: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...]
    digest: str  # SHA-256, in hexadecimal, of the other fields
    contents: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartitionSpec:
    """A parsed `data.partition`: `form` is column, iid, dirichlet or quantity."""

    form: str
    column: str = ""  # of column and dirichlet
    number: float = 0.0  # ALPHA or SKEW


def parse_partition(spec: str) -> PartitionSpec:
    """Return the meaning of `spec`.

    Raises:
        ConfigError: `spec` has none of the four forms.
    """
    form, _, rest = spec.partition(":")
    column, _, number = rest.rpartition(":")  # a column's name may hold a colon itself
    if spec == "iid":
        return PartitionSpec(form)
    if form == "column" and rest:
        return PartitionSpec(form, column=rest)
    if form == "dirichlet" and column and _positive(number):
        return PartitionSpec(form, column=column, number=float(number))
    if form == "quantity" and _positive(rest):
        return PartitionSpec(form, number=float(rest))
    raise ConfigError(f"data.partition = {spec!r}: expected {_FORMS}")


def partition_rows(rows: Sequence[Mapping[str, Any]], spec: str, *, num_clients: int, seed: int) -> Partition:
    """Deal the rows to `num_clients` clients.

    - `column:NAME`: one client for each value of the column; of more values than clients, the ones with most
      rows (ties by value). Clients are named by their value where it can be a name, and sorted by name.
    - `iid`: at random, in sizes that differ by one row at most.
    - `dirichlet:NAME:ALPHA`: the rows of each value of the column are shared out by a draw from a symmetric
      Dirichlet distribution (Hsu et al. 2019, arXiv 1909.06335). Larger ALPHA = more even.
    - `quantity:SKEW`: at random, in sizes proportional to rank ** -SKEW over a random ranking of the clients.
      Larger SKEW = less even.

    In the last three every client gets a row where there are enough. Rows whose column is missing, null,
    empty or not a scalar belong to no client.

    Args:
        rows: the rows in reading order.
        spec: one of the four forms.
        num_clients: clients to deal to, at least 1.
        seed: the run's seed.

    Raises:
        ConfigError: `spec` is malformed, or a column has fewer values than there are clients.
        DataError: no row has a value in the column.
    """
    if num_clients < 1:
        raise ConfigError(f"federation.num-clients = {num_clients}: expected a value at least 1")
    parsed = parse_partition(spec)
    if parsed.form == "column":
        return _by_column(_groups(rows, parsed.column), parsed.column, num_clients)
    parts = _drawn(rows, parsed, num_clients, seed)
    return make_partition((f"client-{number:04d}" for number in range(num_clients)), _without_empty(parts))


def make_partition(
    client_ids: Iterable[str], indices: Iterable[Iterable[int]], contents: Iterable[str] = ()
) -> Partition:
    """Return the partition with its digest; each client's indices are put in ascending order."""
    names, said = tuple(client_ids), tuple(contents)
    owned = tuple(tuple(sorted(rows)) for rows in indices)
    return Partition(names, owned, _digest(names, owned, said), said)


def changed_clients(before: Partition, after: Partition) -> list[str]:
    """Return the clients, by name, that do not have the same rows in both."""
    first, second = (
        dict(zip(one.client_ids, zip(one.indices, one.contents, strict=True), strict=True))
        for one in (before, after)
    )
    return sorted(name for name in first | second if first.get(name) != second.get(name))


def row_label(row: Mapping[str, Any], column: str) -> str | None:
    """Return the value of `column` as text, or None where it is missing, null, empty or not a scalar."""
    value = row.get(column)
    return str(value) if isinstance(value, str | int | float) and value != "" else None


def save_partition(path: str | Path, partition: Partition) -> None:
    """Write `partition` as JSON, in one step and with mode 0600: it tells who owns which rows.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        write_file(Path(path), json.dumps(vars(partition)) + "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder") from None


def load_partition(path: str | Path) -> Partition:
    """Read a partition that `save_partition` wrote.

    Raises:
        DataError: the file cannot be read.
        IntegrityError: it is not a partition, or not the one its digest was taken of.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = tuple(str(name) for name in content["client_ids"])
        owned = tuple(tuple(int(row) for row in rows) for rows in content["indices"])
        stated, said = str(content["digest"]), tuple(map(str, content["contents"]))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); let this user read it") from None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        raise IntegrityError(
            f"{path}: not a partition file of this version; start anew under another run.name"
        ) from None
    if _digest(names, owned, said) != stated:
        raise IntegrityError(f"{path}: does not match its digest; start anew under another run.name")
    return Partition(names, owned, stated, said)


def _digest(names: Sequence[str], owned: Sequence[Sequence[int]], contents: Sequence[str]) -> str:
    fields = [names, owned, contents] if contents else [names, owned]
    canonical = json.dumps(fields, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _positive(text: str) -> bool:
    try:
        number = float(text)
    except ValueError:
        return False
    return number > 0 and math.isfinite(number)


def _groups(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, list[int]]:
    """Return the row indices of each value of `column`, sorted by value."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        label = row_label(row, column)
        if label is not None:
            groups.setdefault(label, []).append(index)
    if not groups:
        present = name_columns(dict.fromkeys(name for row in rows for name in row))
        raise DataError(f"data.partition: no row has a value in column {column!r}; the rows have {present}")
    return dict(sorted(groups.items()))


def _by_column(groups: dict[str, list[int]], column: str, num_clients: int) -> Partition:
    if len(groups) < num_clients:
        raise ConfigError(
            f"federation.num-clients = {num_clients}, but column {column!r} has {len(groups)} values; "
            f"set federation.num-clients to {len(groups)} or choose another data.partition"
        )
    largest = sorted(groups, key=lambda label: (-len(groups[label]), label))[:num_clients]
    owners = {_client_id(label, rank, groups): groups[label] for rank, label in enumerate(sorted(largest))}
    return make_partition(sorted(owners), (owners[name] for name in sorted(owners)))


def _client_id(label: str, rank: int, labels: Mapping[str, Any]) -> str:
    if CLIENT_ID.fullmatch(label):
        return label
    name = f"client-{rank:04d}"
    while name in labels:  # a value that itself looks like a number given here
        name += "x"
    return name


def _drawn(
    rows: Sequence[Mapping[str, Any]], spec: PartitionSpec, num_clients: int, seed: int
) -> list[list[int]]:
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "partition", spec.form)))
    if spec.form == "dirichlet":
        return _dirichlet(list(_groups(rows, spec.column).values()), spec.number, num_clients, generator)
    order = generator.permutation(len(rows)).tolist()
    # A random ranking, or the first clients would always be the large ones.
    ranks = generator.permutation(num_clients) + 1
    weights = np.power(ranks, -spec.number, dtype=np.float64)  # all 1 for iid, whose number is 0
    return _cut(order, np.cumsum(_sizes(len(rows), weights))[:-1].tolist())


def _dirichlet(
    groups: list[list[int]], alpha: float, num_clients: int, generator: np.random.Generator
) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for group in groups:
        order = generator.permutation(group).tolist()
        shares = generator.dirichlet(np.full(num_clients, min(max(alpha, 1e-6), 1e6)))  # beyond: overflow
        # Cut at the cumulative shares, so that roundings do not add up.
        bounds = (np.cumsum(shares)[:-1] * len(order)).astype(int).tolist()
        for part, piece in zip(parts, _cut(order, bounds), strict=True):
            part.extend(piece)
    return parts


def _sizes(total: int, weights: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """Return whole numbers proportional to `weights` that sum to `total` (largest remainders)."""
    exact = total * weights / weights.sum()
    sizes = np.floor(exact).astype(int)
    by_remainder = np.argsort(sizes - exact, kind="stable")
    sizes[by_remainder[: total - int(sizes.sum())]] += 1
    return [int(size) for size in sizes]


def _cut(order: list[int], bounds: list[int]) -> list[list[int]]:
    return [order[start:end] for start, end in zip([0, *bounds], [*bounds, len(order)], strict=True)]


def _without_empty(parts: list[list[int]]) -> list[list[int]]:
    """Return `parts` with a row of the largest moved to each empty one, while any has two rows."""
    filled = [list(part) for part in parts]
    largest = [(-len(part), index) for index, part in enumerate(filled)]
    heapq.heapify(largest)
    for part in (part for part in filled if not part):
        size, donor = largest[0]
        if size >= -1:  # the largest has one row: there are fewer rows than clients
            break
        part.append(filled[donor].pop())
        heapq.heapreplace(largest, (size + 1, donor))
    return filled
