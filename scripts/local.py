"""A federation you step yourself, in this process.

from fedllm.config import RunConfig
from scripts.local import init, step

state = init(RunConfig.from_flat({"federation.num-rounds": 5}))
state, record = step(state)
print(record.train_loss, state.adapter.digest)
"""

from dataclasses import dataclass, replace

from clients.client_app import app
from fedllm.adapters.layout import AdapterState
from fedllm.config import RunConfig
from fedllm.runs.checkpoint import ServerState
from fedllm.types import RoundRecord
from scripts.local_grid import local_grid
from strategies.rounds import next_round
from strategies.run import first_state, open_session
from strategies.session import Session


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
    session = open_session(config, local_grid(config, app, num_nodes))
    return LocalState(session, first_state(session))


def step(state: LocalState) -> tuple[LocalState, RoundRecord]:
    """Return the federation after one more round, and what the round did. `state` itself stays as it was."""
    server, record = next_round(state.session, state.server)
    return replace(state, server=server), record
