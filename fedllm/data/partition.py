"""Deals rows to clients: by a column, evenly, with skewed labels or with skewed sizes.

Drawing uses numpy's PCG64 on streams derived from the run's seed, so every process that holds the same rows
deals them alike; the digest lets two processes check that they did.
"""

import hashlib
import heapq
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.data.fields import name_columns
from fedllm.errors import ConfigError, DataError, IntegrityError
from fedllm.files import write_file
from fedllm.seeds import derive_seed

_NEVER_IN_IDS = '/\\:*?"<>|[]{}$%;`'  # paths, globs, shells and marked-up text use them
CLIENT_ID_FORM = f"1 to 64 printable characters, the first a letter or digit, none of {_NEVER_IN_IDS}"
_MOST_ID_BYTES = 200  # of UTF-8: an id is also the name of a folder, and file systems allow 255
_FORMS = "column:NAME, iid, dirichlet:NAME:ALPHA (ALPHA > 0) or quantity:SKEW (SKEW > 0)"


@dataclass(frozen=True)
class Partition:
    """`indices[i]` are the rows, ascending, of `client_ids[i]`; no row has two owners.

    `contents[i]` is the SHA-256, in hexadecimal, of what those rows say, where they have been read.
    """

    client_ids: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...]
    digest: str  # SHA-256, in hexadecimal, of names, indices and contents
    # The column's value of each client whose name is another; it stays on this machine.
    values: Mapping[str, str] = field(default_factory=dict, compare=False)
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

    In the last three every client gets a row. Rows whose column is missing, null,
    empty or not a scalar belong to no client.

    Args:
        rows: the rows in reading order.
        spec: one of the four forms.
        num_clients: clients to deal to, at least 1.
        seed: the run's seed.

    Raises:
        ConfigError: `spec` is malformed, or a column has fewer values, or the data fewer rows, than there
            are clients.
        DataError: no row has a value in the column.
    """
    if num_clients < 1:
        raise ConfigError(f"federation.num-clients = {num_clients}: expected a value at least 1")
    parsed = parse_partition(spec)
    if parsed.form == "column":
        return _by_column(_groups(rows, parsed.column), parsed.column, num_clients)
    parts = _drawn(rows, parsed, num_clients, seed)
    if (num_rows := sum(map(len, parts))) < num_clients:
        raise ConfigError(
            f"federation.num-clients = {num_clients}, but data.partition = {spec!r} deals {num_rows} rows and"
            f" every client needs one; set federation.num-clients to {num_rows} at most"
        )
    return make_partition((f"client-{number:04d}" for number in range(num_clients)), _without_empty(parts))


def is_client_id(text: str) -> bool:
    """Return whether `text` can name a client: printed anywhere, and as a folder of any file system.

    The form is `CLIENT_ID_FORM`, composed (Unicode NFC), without spaces at the end or two in a row.
    """
    return (
        0 < len(text) <= 64
        and text[0].isalnum()
        and text.isprintable()  # no control character, none that turns the direction of writing
        and not set(_NEVER_IN_IDS) & set(text)
        and text == _tidy(text)
        and len(text.encode()) <= _MOST_ID_BYTES
    )


def make_partition(
    client_ids: Iterable[str],
    indices: Iterable[Iterable[int]],
    values: Mapping[str, str] | None = None,
    contents: Iterable[str] = (),
) -> Partition:
    """Return the partition with its digest; each client's indices are put in ascending order."""
    names, said = tuple(client_ids), tuple(contents)
    owned = tuple(tuple(sorted(rows)) for rows in indices)
    return Partition(names, owned, _digest(names, owned, said), values or {}, said)


def changed_clients(before: Partition, after: Partition) -> list[str]:
    """Return the clients, by name, that do not have the same rows in both."""
    first, second = (
        dict(zip(one.client_ids, zip(one.indices, one.contents, strict=True), strict=True))
        for one in (before, after)
    )
    return sorted(name for name in first | second if first.get(name) != second.get(name))


def row_label(row: Mapping[str, Any], column: str) -> str | None:
    """Return the value of `column` as text, or None where it is missing, null, NaN, empty or not a scalar."""
    value = row.get(column)
    is_label = isinstance(value, str | int | float) and value != "" and value == value  # NaN equals nothing
    return str(value) if is_label else None


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
        values = {str(name): str(value) for name, value in content.get("values", {}).items()}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); let this user read it") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        raise IntegrityError(
            f"{path}: not a partition file of this version; start anew under another run.name"
        ) from None
    if _digest(names, owned, said) != stated:
        raise IntegrityError(f"{path}: does not match its digest; start anew under another run.name")
    return Partition(names, owned, stated, values, said)


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
    names = _client_ids(sorted(largest), groups)
    owners = {names[label]: groups[label] for label in names}
    values = {name: label for label, name in names.items() if name != label}
    return make_partition(sorted(owners), (owners[name] for name in sorted(owners)), values)


def _client_ids(labels: Sequence[str], groups: Iterable[str]) -> dict[str, str]:
    """Return a name for each of some values of a column: the value itself where it can be one, else a number.

    Names that some disks take for one, as those that differ by case, are one name: the first value keeps it.
    """
    used, names = set(), {}
    others = set(map(_folded, groups))  # values that themselves look like a number given here
    for rank, label in sorted(enumerate(labels), key=lambda item: not is_client_id(item[1])):
        name = _tidy(label)  # a value as it is comes before one that is the same when tidied
        if not is_client_id(name) or _folded(name) in used:
            name = f"client-{rank:04d}"
            while name in others or name in used:
                name += "x"
        used.add(_folded(name))
        names[label] = name
    return names


def _tidy(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


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
    """Return `parts`, with as many rows as there are parts or more, with one of the largest moved to each
    empty part.
    """
    filled = [list(part) for part in parts]
    largest = [(-len(part), index) for index, part in enumerate(filled)]
    heapq.heapify(largest)
    for part in (part for part in filled if not part):
        size, donor = largest[0]
        part.append(filled[donor].pop())
        heapq.heapreplace(largest, (size + 1, donor))
    return filled
