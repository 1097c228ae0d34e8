"""The rows of a node's clients, and those rows as tokens: the only code that reads private text."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from threading import RLock
from typing import Any

from clients.site import NodeConfig
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import BadRow, ClientRows, Example, count_reasons
from fedllm.data.partition import CLIENT_ID_FORM, is_client_id
from fedllm.data.shards import Shards, load_one_client, load_shards
from fedllm.errors import ConfigError, DataError, NoDataError
from fedllm.models.chat import Encoded, encode

_logger = logging.getLogger("fedllm.clients")
_STDERR = RLock()  # of two threads that put it back in the wrong order, one would lose it for good


@dataclass(frozen=True)
class ClientTokens:
    """One client's rows as the model reads them."""

    client_id: str
    train: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]

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
    """Return the rows of the clients this node hosts.

    A node started with `data-path` is one data holder with its own file, whatever the server's `data.source`
    says. Otherwise the source is dealt to all clients, and node p of n hosts every n-th of them.
    """
    partition, num_partitions = int(node.get("partition-id", 0)), int(node.get("num-partitions", 1))
    if "data-path" in node:
        client_id = str(node.get("client-id", f"client-{partition:04d}"))
        if not is_client_id(client_id):
            raise ConfigError(f"client-id {client_id!r}: expected {CLIENT_ID_FORM}")
        try:
            shard = load_one_client(
                str(node["data-path"]), config.data, client_id=client_id, seed=config.seed
            )
        except NoDataError as error:
            _logger.warning("%s", error)
            return [ClientRows(client_id, (), ())]  # it joins and declares no rows; the server leaves it out
        _report(shard.bad)
        return [shard.client]
    return list(read(config).clients[partition::num_partitions])  # so that all nodes host about as many


def _report(bad: tuple[BadRow, ...]) -> None:
    if bad:
        _logger.warning("%d bad rows skipped: %s", len(bad), count_reasons(bad))


def encode_client(rows: ClientRows, tokenizer: Any, max_length: int) -> ClientTokens:
    """Return a client's rows as tokens; those without an answer within `max_length` are left out."""

    def kept(examples: tuple[Example, ...]) -> tuple[Encoded, ...]:
        encoded = (encode(example, tokenizer, max_length) for example in examples)
        return tuple(row for row in encoded if row is not None)

    with _native_errors_dropped(), ExitStack() as stack:
        stack.push(partial(_refuse_panic, rows.client_id))
        client = ClientTokens(rows.client_id, kept(rows.train), kept(rows.held_out))
    usable = (*client.train, *client.held_out)
    num_lost = len(rows.train) + len(rows.held_out) - len(usable)
    num_cut = sum(row.num_cut > 0 for row in usable)
    if num_lost or num_cut:
        _logger.warning(
            "client %s: at train.max-length %d, %d rows lose their whole answer, or are none that the model's"
            " chat template takes, and are skipped, %d are truncated",
            rows.client_id,
            max_length,
            num_lost,
            num_cut,
        )
    return client


@contextmanager
def _native_errors_dropped() -> Iterator[None]:
    """Drop what is written to this process's stderr within the block.

    Rust code that panics, as a tokenizer may, prints its message there by itself, and the message quotes the
    text.
    """
    with _STDERR, open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _refuse_panic(client_id: str, kind: type[BaseException] | None, *about: object) -> None:
    """Raise one line in place of a panic, which quotes the text and is no `Exception`, as a block ends.

    Raises:
        DataError: the block ended with one.
    """
    if kind is not None and not issubclass(kind, Exception | KeyboardInterrupt | SystemExit):
        raise DataError(
            f"client {client_id}: the tokenizer broke down ({kind.__name__}) on one of its rows; leave out"
            " rows of unusual characters or length, or choose another model.name"
        ) from None
