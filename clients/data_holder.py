"""A data holder: the clients of this node, and the engine that trains them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from clients.base_deltas import BaseDeltaStore
from clients.canaries import draw_canaries
from clients.lost_rows import RowCounts
from clients.site import (
    NodeConfig,
    check_model,
    check_paths,
    check_privacy,
    data_path_of,
    max_rank_of,
    state_path_of,
)
from clients.state import PrivateStore
from clients.tokens import ClientTokens, encode_client, hosted_rows, report_rows, without_few_rows
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.run_config import RunConfig
from fedllm.data.shards import Shards
from fedllm.engine.engine import Engine
from fedllm.engine.resident import Resident
from fedllm.models.base import layout_of
from fedllm.models.files import ModelFiles, fingerprint, resolve_model
from fedllm.models.tokenizer_fit import num_embeddings
from fedllm.plan.run_plan import RunPlan, resolve


@dataclass(frozen=True, eq=False)
class DataHolder:
    """The clients of one node. Nothing is loaded before it is needed: joining needs no weights.

    `max_rank` is the largest rank this machine has room for, 0 = any. Below `state_path` every run has a
    folder for what its clients keep. `data_path` is where the rows are that this node was started with, None
    where its clients have their share of the run's source.
    """

    plan: RunPlan
    resident: Resident
    base_deltas: BaseDeltaStore
    files: ModelFiles
    clients: Mapping[str, ClientTokens]
    max_rank: int
    state_path: Path
    data_path: Path | None = None

    @property
    def counts(self) -> dict[str, RowCounts]:
        """What became of the rows of each client."""
        return {name: client.counts for name, client in self.clients.items()}

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
        # The layout is in the name: vectors of another one, of a run of the same name, are not even tried.
        return PrivateStore(self.state_path / f"{self.plan.config.run.name}-{digest[:16]}", digest)

    @cached_property
    def initial(self) -> AdapterState:
        """The adapter that the run's seed gives; a server need not send the parts it has not changed."""
        # Server and node draw it alike, so a frozen or local factor need not travel.
        return initial_adapter(self.engine.layout, self.plan.config.seed, self.plan.init_a)


def open_data_holder(
    config: RunConfig,
    node: NodeConfig,
    resident: Resident,
    base_deltas: BaseDeltaStore,
    read: Callable[[RunConfig], Shards],
) -> DataHolder:
    """Return a node's data holder; `read` deals the source's rows where the node has no file of its own.

    Raises:
        FedLLMError: the configuration, the data or the base model cannot be used.
    """
    check_paths(config, node)  # before anything is opened that a server may have named
    plan = resolve(config)
    check_privacy(plan.privacy, node)
    if "model-path" in node:  # this machine's own copy; the fingerprint tells whether it is the run's
        plan = plan.with_own_model(str(node["model-path"]))
    files = resolve_model(plan.config.model.name)
    check_model(files)
    tokenizer, state_path = resident.tokenizer(files), state_path_of(node)
    resident.check_tokenizer(plan.config.model, config.train.max_length)
    clients, limit, known = {}, config.train.max_length, num_embeddings(files)
    for rows in hosted_rows(config, node, read):
        client = encode_client(rows, tokenizer, limit, known)
        if client.is_left_out:
            client = replace(client, train=(), held_out=())
        client = without_few_rows(client)
        # A client without rows gets no canaries either: it declares none and is left out.
        extra = draw_canaries(config, tokenizer, client.client_id, state_path) if client.num_rows else ()
        clients[client.client_id] = client.with_rows(extra)
    data_path, rank = data_path_of(node), max_rank_of(node)
    holder = DataHolder(plan, resident, base_deltas, files, clients, rank, state_path, data_path)
    report_rows(holder.counts, limit)
    return holder
