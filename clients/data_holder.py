"""A data holder: the clients of this node, their rows as tokens, and the engine that trains them.

The only code that turns private text into tokens.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from clients.base_deltas import BaseDeltaStore
from clients.canaries import draw_canaries
from clients.site import check_paths, check_privacy, max_rank_of, state_path_of
from clients.state import PrivateStore
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import BadRow, ClientRows, Example
from fedllm.data.partition import CLIENT_ID
from fedllm.data.shards import Shards, load_one_client, load_shards
from fedllm.engine.engine import Engine
from fedllm.engine.resident import Resident
from fedllm.errors import ConfigError, NoDataError
from fedllm.models.base import layout_of
from fedllm.models.chat import Encoded, encode
from fedllm.models.files import ModelFiles, fingerprint, resolve_model
from fedllm.plan.run_plan import RunPlan, resolve

_logger = logging.getLogger("fedllm.clients")


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


@dataclass(frozen=True, eq=False)
class DataHolder:
    """The clients of one node. Nothing is loaded before it is needed: joining needs no weights.

    `max_rank` is the largest rank this machine has room for, 0 = any. Below `state_path` every run has a
    folder for what its clients keep.
    """

    plan: RunPlan
    resident: Resident
    base_deltas: BaseDeltaStore
    files: ModelFiles
    clients: Mapping[str, ClientTokens]
    max_rank: int
    state_path: Path

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of this machine's copy of the base model."""
        return fingerprint(self.files.folder)

    @cached_property
    def engine(self) -> Engine:
        """The training engine on this machine's resident base model."""
        config = self.plan.config
        base = self.resident.base(config.model)
        layout = layout_of(base.model, config.lora, base.fingerprint)
        return self.resident.engine(config.model, layout, config.train.token_budget)

    @cached_property
    def store(self) -> PrivateStore:
        """Where this run's clients keep what never leaves them."""
        digest = self.engine.layout.digest
        return PrivateStore(self.state_path / f"{self.plan.config.run.name}-{digest[:16]}", digest)

    @cached_property
    def initial(self) -> AdapterState:
        """The adapter that the run's seed gives, of which a server may leave out what it has not changed."""
        return initial_adapter(self.engine.layout, self.plan.config.seed, self.plan.init_a)


def open_data_holder(
    config: RunConfig,
    node: Mapping[str, Scalar],
    resident: Resident,
    base_deltas: BaseDeltaStore,
    read: Callable[[RunConfig], Shards],
) -> DataHolder:
    """Return a node's data holder; `read` deals the source's rows where the node has no file of its own.

    Raises:
        FedLLMError: the configuration, the data or the base model cannot be used.
    """
    check_paths(config, node)
    plan = resolve(config)
    check_privacy(plan.privacy)
    if "model-path" in node:  # this machine's own copy; the fingerprint tells whether it is the run's
        plan = plan.with_own_model(str(node["model-path"]))
    files = resolve_model(plan.config.model.name)
    tokenizer, state_path = resident.tokenizer(files), state_path_of(node)
    clients = {}
    for rows in hosted_rows(config, node, read):
        client = encode_client(rows, tokenizer, config.train.max_length)
        extra = draw_canaries(config, tokenizer, client.client_id, state_path) if client.train else ()
        clients[client.client_id] = replace(client, train=(*client.train, *extra))
    return DataHolder(plan, resident, base_deltas, files, clients, max_rank_of(node), state_path)


def read_source(config: RunConfig) -> Shards:
    """Return the rows of `data.source`, dealt to all clients of a run."""
    shards = load_shards(config.data, num_clients=config.federation.num_clients, seed=config.seed)
    _report(shards.bad)
    return shards


def hosted_rows(
    config: RunConfig, node: Mapping[str, Scalar], read: Callable[[RunConfig], Shards] = read_source
) -> list[ClientRows]:
    """Return the rows of the clients this node hosts.

    A node started with `data-path` is one data holder with its own file, whatever the server's `data.source`
    says. Otherwise the source is dealt to all clients, and node p of n hosts every n-th of them.
    """
    partition, num_partitions = int(node.get("partition-id", 0)), int(node.get("num-partitions", 1))
    if "data-path" in node:
        client_id = str(node.get("client-id", f"client-{partition:04d}"))
        if not CLIENT_ID.fullmatch(client_id):
            raise ConfigError(f"client-id {client_id!r}: expected up to 64 letters, digits, '.', '_' or '-'")
        try:
            shard = load_one_client(
                str(node["data-path"]), config.data, client_id=client_id, seed=config.seed
            )
        except NoDataError as error:
            _logger.warning("%s", error)
            return [ClientRows(client_id, (), ())]
        _report(shard.bad)
        return [shard.client]
    return list(read(config).clients[partition::num_partitions])


def _report(bad: tuple[BadRow, ...]) -> None:
    if bad:
        first = bad[0]
        _logger.warning(
            "%d bad rows skipped; the first: %s, line %d: %s", len(bad), first.file, first.line, first.reason
        )


def encode_client(rows: ClientRows, tokenizer: Any, max_length: int) -> ClientTokens:
    """Return a client's rows as tokens; those without an answer within `max_length` are left out."""

    def kept(examples: tuple[Example, ...]) -> tuple[Encoded, ...]:
        encoded = (encode(example, tokenizer, max_length) for example in examples)
        return tuple(row for row in encoded if row is not None)

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
