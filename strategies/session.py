"""Objects that live for the whole run, and its progress callbacks."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from flwr.serverapp.strategy import Strategy

from fedllm.adapters.layout import AdapterLayout, AdapterState, initial_adapter
from fedllm.config.key import number_or
from fedllm.config.run_config import RunConfig
from fedllm.data.public_text import PublicText
from fedllm.engine.resident import Resident
from fedllm.messages import ClientFailure, ClientUpdate, JoinedClient
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import read_left_out
from fedllm.runs.records import RoundRecord
from strategies.grid.transport import Reply, Sent, Transport
from strategies.grid.what_nodes_hold import HeldByNodes
from strategies.memory import Room
from strategies.privacy import ServerPrivacy
from strategies.sites import Sites, read_sites


@dataclass(frozen=True)
class Watch:
    """What the person who started the run wants to hear; every callable may be left out.

    `phase` hears what begins or goes on (joining, training, evaluating, distilling), how much of it is done
    and of how many; 0 of 0 where it is not counted. `joined` hears of all who take part from the start,
    `joined_later` of others, and of who is back. `reply` hears of every answer that comes, late ones too.
    """

    notice: Callable[[str], None] = lambda line: None
    joined: Callable[[Mapping[str, JoinedClient]], None] = lambda clients: None
    joined_later: Callable[[Mapping[str, JoinedClient]], None] = lambda clients: None
    phase: Callable[[str, int, int], None] = lambda name, done, number: None
    reply: Callable[[Sent, Reply], None] = lambda sent, reply: None
    client: Callable[[int, ClientUpdate | ClientFailure], None] = lambda round_num, result: None
    record: Callable[[RoundRecord], None] = lambda record: None
    saved: Callable[[ServerState], None] = lambda state: None


SILENT = Watch()


@dataclass(frozen=True, eq=False)
class Session:
    """The objects of one run at the server.

    Six of them change while it runs: `clients` (more may join), `transport` (messages under way),
    `held_by_nodes` (what need not be sent again), `resident` (the base model, loaded when first used), `room`
    (where updates wait) and `barred` (who broke the protocol of a secret sum, and is not asked again in that
    round).
    What a round computes with is in the `ServerState` instead, which never changes.
    """

    plan: RunPlan
    layout: AdapterLayout
    transport: Transport
    clients: dict[str, JoinedClient]
    watch: Watch = SILENT
    held_by_nodes: HeldByNodes = field(default_factory=HeldByNodes)
    resident: Resident = field(default_factory=Resident)  # the base model of this process, for distillation
    stock: Strategy | None = None  # a stock Flower strategy in place of our own mean
    privacy: ServerPrivacy | None = None
    folder: Path | None = None  # the run's
    room: Room = field(default_factory=Room)
    barred: dict[str, int] = field(default_factory=dict)  # client -> round
    public_text: tuple[PublicText, ...] = ()  # what distillation steps may read besides synthetic text

    @property
    def config(self) -> RunConfig:
        """The keys of the run."""
        return self.plan.config

    @cached_property  # compared with in every request, and costly for a large model
    def initial(self) -> AdapterState:
        """The adapter that the run's seed gives."""
        return initial_adapter(self.layout, self.config.seed, self.plan.init_a)

    @cached_property  # a list that is edited counts from the next start on
    def sites(self) -> Sites | None:
        """The sites that are admitted, None where any are."""
        return read_sites(self.config.federation.sites)

    @cached_property
    def left_out(self) -> frozenset[str]:
        """The clients that the run goes on without, whether or not they want to join."""
        return read_left_out(self.folder) if self.folder else frozenset()

    def deadline(self, message_type: str) -> float:
        """Return how many seconds a phase waits for the replies to its messages."""
        return number_or(self.config.federation.round_deadline, self.transport.usual_deadline(message_type))

    def ranks(self) -> dict[str, int]:
        """Return every client's rank: what `lora.client-ranks` deals it, at most its machine's limit."""
        dealt = self.plan.ranks(self.clients)
        return {client: min(rank, self.clients[client].max_rank or rank) for client, rank in dealt.items()}

    def by_node(self, clients: Iterable[str]) -> dict[int, list[str]]:
        """Group client ids by the node that hosts them, in their order; without who has lost its place."""
        grouped: dict[int, list[str]] = {}
        for client in clients:
            if client not in self.clients:
                continue
            grouped.setdefault(self.clients[client].node_id, []).append(client)
        return grouped
