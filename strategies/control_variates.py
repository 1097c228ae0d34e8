"""The server's half of SCAFFOLD (`fedllm.engine.gradient_terms`): c, the mean of the clients' c_i.

Only accepted updates change c, and a client whose update was not accepted goes on from the c_i it had before:
c stays the mean whatever is lost on the way, up to rounding.

The mean is over `federation.num-clients`: those that never trained have c_i = 0. Where more clients than that
have trained, it is over all of these: nobody who joined is left out, and c is rescaled when one is added.
"""

from dataclasses import dataclass, replace

import torch

from fedllm.adapters.layout import AdapterState
from fedllm.messages import ClientUpdate
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from strategies.collector import RoundOutcome
from strategies.session import Session


@dataclass(frozen=True, eq=False)
class ControlSum:
    """The running sum of the changes of c_i; `num_clients` is the least number that c is the mean over."""

    num_clients: int
    sum_P: torch.Tensor  # float64, so that adding in a fixed order gives fixed bits

    def add(self, update: ClientUpdate) -> None:
        """Add the change that an accepted update brought."""
        assert update.control_delta is not None
        self.sum_P.add_(update.control_delta)

    def close(self, before: ServerState, after: ServerState, record: RoundRecord) -> RoundOutcome:
        """Return the state with the next c."""
        if not record.applied or not record.accepted:
            return after, record
        old, new = (max(self.num_clients, len(state.num_drawn)) for state in (before, after))
        # Clients that train for the first time may make the mean's number grow; their earlier c_i were zero.
        control = control_of(before)
        mean_P = control.vector.double() * (old / new) + self.sum_P / new
        return replace(after, control=AdapterState(control.layout, mean_P.float())), record


def open_control_sum(session: Session) -> ControlSum | None:
    """Return the empty sum of a round, None in a run without control variates."""
    if not session.config.train.control_variates:
        return None
    no_change_P = torch.zeros(session.layout.size, dtype=torch.float64)
    return ControlSum(session.config.federation.num_clients, no_change_P)


def control_of(state: ServerState) -> AdapterState:
    """Return c; before the first round it is zero."""
    layout = state.adapter.layout
    return state.control or AdapterState(layout, torch.zeros(layout.size))
