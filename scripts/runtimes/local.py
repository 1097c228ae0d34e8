"""Flower's grid without Flower's processes: messages become function calls in this process.

The same ServerApp and ClientApp run over it as over a SuperLink, a few milliseconds a round apart. Outside
a Flower process two internals must be set by hand, the task's identity and a message's id; both are here
and nowhere else, under a contract test.
"""

import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clients.client_app import app
from clients.process import PROCESS
from fedllm.adapters.layout import AdapterState
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import run_folder
from fedllm.runs.records import RoundRecord
from strategies.first_state import first_state
from strategies.rounds import next_round
from strategies.session import Session
from strategies.start import open_session

SERVER_NODE = 1  # the node id that Flower gives its SuperLink


class LocalGrid(Grid):
    """Runs `client_app` once per message, when its reply is pulled: one at a time, in order of sending."""

    def __init__(self, client_app: ClientApp, contexts: Mapping[int, Context]):
        self._client_app = client_app
        self.contexts = contexts
        self._waiting: dict[str, Message] = {}
        self.errors: dict[int, str] = {}  # node -> what it logged of its last error
        # A simulation is what Flower calls a run whose nodes are all there from the start.
        self._run = replace(Run.create_empty(run_id=1), primary_task_type=TaskType.SIMULATION)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SERVER_NODE

    def set_run(self, run: Run) -> None:
        """Replace the run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node."""
        return Message(
            content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl
        )

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of this process."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages and return their ids."""
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first of the named messages that waits, and return its reply."""
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                node = message.metadata.dst_node_id
                with _error_kept(self.errors, node):
                    return [self._client_app(message, self.contexts[node])]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run all messages and return their replies."""
        ids = list(self.push_messages(messages))
        return [reply for message_id in ids for reply in self.pull_messages([message_id])]


@contextmanager
def _error_kept(errors: dict[int, str], node: int) -> Iterator[None]:
    """Keep the last error that the clients of this process log in the block as the node's."""

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            errors[node] = record.getMessage()
        return True

    logger = logging.getLogger("fedllm.clients")
    errors.pop(node, None)
    logger.addFilter(keep)  # not a handler: where none is installed Python prints errors by itself
    try:
        yield
    finally:
        logger.removeFilter(keep)


def local_grid(config: RunConfig, client_app: ClientApp, num_nodes: int = 1) -> LocalGrid:
    """Return a grid of `num_nodes` nodes in this process that share the clients of `config`.

    This process is the data holder, so its nodes open the paths the configuration names, and what its
    clients keep for themselves lies in the run folder.
    """
    flat: dict[str, Scalar] = config.to_flat()
    contexts = {
        node_id: Context(
            run_id=1,
            node_id=node_id,
            node_config=node_config_of(config, index, num_nodes),
            state=RecordDict(),
            run_config=flat,
        )
        for index, node_id in enumerate(range(SERVER_NODE + 1, SERVER_NODE + 1 + num_nodes))
    }
    return LocalGrid(client_app, contexts)


def node_config_of(config: RunConfig, index: int = 0, num_nodes: int = 1) -> dict[str, Scalar]:
    """Return how node `index` of a local grid is started."""
    return {
        "partition-id": index,
        "num-partitions": num_nodes,
        "server-paths": True,
        "state-path": str(run_folder(config) / "private"),  # so that a resumed run finds it
    }


@dataclass(frozen=True, eq=False)
class LocalState:
    """A running federation: its session, and the server's state after the last round."""

    session: Session
    server: ServerState

    @property
    def adapter(self) -> AdapterState:
        """The adapter after the last round."""
        return self.server.adapter

    @property
    def records(self) -> tuple[RoundRecord, ...]:
        """What every round so far did; record 0 holds the losses of the base model."""
        return self.server.records


def init(config: RunConfig, *, num_nodes: int = 1) -> LocalState:
    """Return a federation before its first round.

    Nothing is written to disk but what clients keep for themselves, if anything (`fedllm.runs.folder`).

    Raises:
        FedLLMError: the model or the data cannot be used, or too few clients have rows.
    """
    session = open_session(resolve(config), local_grid(config, app, num_nodes), resident=PROCESS.resident)
    return LocalState(session, first_state(session))


def step(state: LocalState) -> tuple[LocalState, RoundRecord]:
    """Return the federation after one more round, and what the round did. `state` itself stays as it was.

    Raises:
        RunFailedError: the round failed for good; DivergedError, a kind of it: its numbers are not finite.
        BudgetSpentError: it would exceed the privacy budget.
    """
    server, record = next_round(state.session, state.server)
    return replace(state, server=server), record
