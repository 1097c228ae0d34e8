"""The rows of a node's clients, and those rows as tokens: the only code that reads private text."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from clients.forgotten import without_forgotten
from clients.lost_rows import RowCounts, count_rows, describe
from clients.own_rows import own_split
from clients.site import NodeConfig, state_path_of
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import BadRow, ClientRows, Example, count_reasons
from fedllm.data.partition import CLIENT_ID_FORM, is_client_id
from fedllm.data.shards import Shards, load_one_client, load_shards, load_split_rows
from fedllm.errors import ConfigError, DataError, NoDataError
from fedllm.models.chat import REFUSED, Encoded, NoRow, encode_or_cause
from fedllm.models.panics import panics_refused
from fedllm.site_policy import load_policy

_logger = logging.getLogger("fedllm.clients")


@dataclass(frozen=True)
class ClientTokens:
    """One client's rows as the model reads them."""

    client_id: str
    train: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]
    counts: RowCounts = RowCounts()  # of all its rows, also of those that are left out
    num_public: int | None = None  # training rows that it declares, where what they say must not show in it

    @property
    def num_rows(self) -> int:
        """The number of training rows that it declares, and by which it samples, clips and weighs."""
        return len(self.train) if self.num_public is None else self.num_public

    @property
    def is_left_out(self) -> bool:
        """Whether it takes no part as too many of its rows are lost."""
        return self.num_public is None and self.counts.are_too_many_lost

    def with_rows(self, more: tuple[Encoded, ...]) -> "ClientTokens":
        """Return the client with further rows to train on."""
        public = None if self.num_public is None else self.num_public + len(more)
        return replace(self, train=(*self.train, *more), num_public=public)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the training rows' tokens and labels, which never leaves this machine."""
        hasher = hashlib.sha256()
        for row in self.train:
            hasher.update(repr((row.tokens, row.labels)).encode())
        return hasher.hexdigest()


def read_source(config: RunConfig) -> Shards:
    """Return the rows of `data.source`, dealt to all clients of a run."""
    shards = load_shards(config.data, num_clients=config.federation.num_clients, seed=config.seed)
    _report(shards.bad)
    return shards


def hosted_rows(
    config: RunConfig, node: NodeConfig, read: Callable[[RunConfig], Shards] = read_source
) -> list[ClientRows]:
    """Return the rows of the clients this node hosts, but those that its owner has taken back.

    A node started with `data-path` is one data holder with its own file, whatever the server's `data.source`
    says. Otherwise the source is dealt to all clients, and node p of n hosts every n-th of them.
    """
    state_path = state_path_of(node)
    return [without_forgotten(rows, state_path) for rows in _rows_of_clients(config, node, read)]


def _rows_of_clients(
    config: RunConfig, node: NodeConfig, read: Callable[[RunConfig], Shards]
) -> Sequence[ClientRows]:
    partition, num_partitions = int(node.get("partition-id", 0)), int(node.get("num-partitions", 1))
    if "data-path" in node:
        client_id = str(node.get("client-id", f"client-{partition:04d}"))
        if not is_client_id(client_id):
            raise ConfigError(f"client-id {client_id!r}: expected {CLIENT_ID_FORM}")
        try:
            path, own = str(node["data-path"]), own_split(node)
            if own is None:
                shard = load_one_client(path, config.data, client_id=client_id, seed=config.seed)
            else:
                shard = load_split_rows(path, config.data, client_id=client_id, seed=config.seed, split=own)
        except NoDataError as error:
            _logger.warning("%s", error)
            return [ClientRows(client_id, (), ())]  # it joins and declares no rows; the server leaves it out
        _report(shard.bad)
        return [shard.client]
    return read(config).clients[partition::num_partitions]  # so that all nodes host about as many


def _report(bad: tuple[BadRow, ...]) -> None:
    if bad:
        _logger.warning("%d bad rows skipped: %s", len(bad), count_reasons(bad))


def encode_client(
    rows: ClientRows, tokenizer: Any, max_length: int, num_embeddings: int | None = None
) -> ClientTokens:
    """Return a client's rows as tokens, and counts of those that are left out, and why.

    Raises:
        DataError: the tokenizer breaks down on one of them; the message quotes nothing of it. Where failing
            would tell of that row, it is left out instead.
    """
    examples = (*rows.train, *rows.held_out)

    def refusal(kind: str) -> DataError:
        return DataError(
            f"client {rows.client_id}: the tokenizer broke down ({kind}) on one of its rows; leave out"
            " rows of unusual characters or length, or choose another model.name"
        )

    def encode_all(some: Sequence[Example]) -> list[Encoded | NoRow]:
        with panics_refused(refusal):
            return [encode_or_cause(example, tokenizer, max_length, num_embeddings) for example in some]

    def encode_one(example: Example) -> Encoded | NoRow:
        try:
            return encode_all([example])[0]
        except DataError:
            return NoRow(REFUSED)

    try:
        encoded = encode_all(examples)
    except DataError:
        if rows.num_public is None:
            raise
        encoded = [encode_one(example) for example in examples]
    train, held_out = (
        tuple(row for row in part if isinstance(row, Encoded))
        for part in (encoded[: len(rows.train)], encoded[len(rows.train) :])
    )
    counts = count_rows(examples, encoded, tokenizer, rows.num_bad)
    return ClientTokens(rows.client_id, train, held_out, counts, rows.num_public)


def without_few_rows(client: ClientTokens) -> ClientTokens:
    """Return a client without the training rows, or held-out rows, that this site finds too few."""
    limits = load_policy().limits
    fewest = {"train-rows": (client.num_rows, limits.train_rows)}
    fewest["held-out-rows"] = (len(client.held_out), limits.held_out_rows)
    few = [name for name, (number, least) in fewest.items() if 0 < number < least]
    for name in few:
        _logger.warning("client %s: fewer rows than [limits] %s; none are used", client.client_id, name)
    if "train-rows" in few:
        client = replace(client, train=(), num_public=client.num_public and 0)
    return replace(client, held_out=()) if "held-out-rows" in few else client


def report_rows(counts: Mapping[str, RowCounts], max_length: int) -> None:
    """Log on this machine what became of the rows of its clients that take part."""
    others = {name: count for name, count in counts.items() if not count.are_too_many_lost}
    if told := describe(sum(others.values(), RowCounts()), max_length):
        who = f"client {next(iter(others))}" if len(others) == 1 else f"{len(others)} clients"
        _logger.warning("%s: %s", who, told)
