"""What one process keeps from message to message, so that it reads, tokenises and loads once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import cast

from clients.base_deltas import BaseDeltaStore
from clients.data_holder import DataHolder, open_data_holder
from clients.site import NodeConfig
from clients.tokens import read_source
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.data.shards import Shards
from fedllm.engine.resident import Resident
from fedllm.files import cache_folder
from fedllm.site_policy import SitePolicy, load_policy

NUM_HOLDERS = 64  # a simulation's worker may host any of its nodes in turn


@dataclass(eq=False)
class Process:
    """The base model, the data holders of one run, the rows of the last source read, base deltas.

    A Flower app has one (`PROCESS`), a script or a test its own. The server of a local run shares
    its `resident` base model.
    """

    resident: Resident = field(default_factory=Resident)
    holders: dict[tuple[object, object], DataHolder] = field(default_factory=dict)
    sources: dict[RunConfig, Shards] = field(default_factory=dict)
    policy: SitePolicy | None = None  # under which all that is kept was opened

    def __reduce__(self) -> tuple[Callable[[], "Process"], tuple[()]]:
        """Pickle no content: Ray copies the app with every message, and a worker keeps its own content."""
        return own_process, ()

    @cached_property
    def base_deltas(self) -> BaseDeltaStore:
        """The base deltas of this machine, in the user's cache."""
        return BaseDeltaStore(cache_folder() / "base-deltas")

    def open(self, run_config: Mapping[str, Scalar], node_config: NodeConfig) -> DataHolder:
        """Return the data holder of a node, opening it on first use.

        Raises:
            FedLLMError: the configuration, the data or the base model cannot be used.
        """
        if (policy := load_policy()) != self.policy:
            if self.policy is not None:  # what the owner permitted then may be refused now
                self.release()
            self.policy = policy
        run, node = tuple(sorted(run_config.items())), tuple(sorted(node_config.items()))
        if (run, node) not in self.holders:
            # Those of another run would keep its base model in memory, next to this one's.
            self.holders = {key: holder for key, holder in self.holders.items() if key[0] == run}
            config = RunConfig.from_flat(run_config)  # refuses unknown keys before anything is opened
            holder = open_data_holder(config, node_config, self.resident, self.base_deltas, self.read_source)
            while len(self.holders) >= NUM_HOLDERS:
                del self.holders[next(iter(self.holders))]  # the one that was opened first
            self.holders[run, node] = holder
        return self.holders[run, node]

    def forget_rows(self) -> None:
        """Read the rows again when they are next asked for; the base model stays."""
        self.holders, self.sources = {}, {}

    def release(self) -> None:
        """Let go of everything that can be opened again, and give its memory back to the system."""
        self.forget_rows()
        self.resident.release()

    def read_source(self, config: RunConfig) -> Shards:
        """Return the rows of `data.source` dealt to all clients; read again only for another source."""
        relevant = RunConfig(seed=config.seed, data=config.data)
        federation = replace(relevant.federation, num_clients=config.federation.num_clients)
        relevant = replace(relevant, federation=federation)  # the same whatever else changes between runs
        if relevant not in self.sources:
            self.sources = {relevant: read_source(relevant)}
        return self.sources[relevant]


PROCESS = Process()


def own_process() -> Process:
    """Return the one of the process that calls."""
    # By name: Flower loads modules anew, so a reference could be to another copy of this one.
    return cast(Process, import_module("clients.process").PROCESS)
