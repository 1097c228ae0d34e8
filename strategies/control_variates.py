"""The server's half of SCAFFOLD (`fedllm.training.control_variates`): c, the mean of the clients' c_i.

Only accepted updates change c, and a client whose update was not accepted goes on from the c_i it had before:
c stays the mean whatever is lost on the way, up to rounding.
"""

from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.runs.checkpoint import ServerState
from fedllm.types import ClientUpdate


@dataclass(frozen=True, eq=False)
class ControlSum:
    """The running sum of the changes of c_i, in float64; `add` in a fixed order gives fixed bits."""

    sum_P: torch.Tensor

    def add(self, update: ClientUpdate) -> None:
        """Add the change that an accepted update brought."""
        assert update.control_delta is not None
        self.sum_P.add_(update.control_delta)

    def added_to(self, control: AdapterState, num_clients: int) -> AdapterState:
        """Return c + sum / N over all clients of the federation: those that never trained have c_i = 0."""
        after = control.vector.double() + self.sum_P / num_clients
        return AdapterState(control.layout, after.float())


def empty_sum(layout: AdapterLayout) -> ControlSum:
    """Return the sum of no changes."""
    return ControlSum(torch.zeros(layout.size, dtype=torch.float64))


def control_of(state: ServerState) -> AdapterState:
    """Return c; before the first round it is zero."""
    layout = state.adapter.layout
    return state.control or AdapterState(layout, torch.zeros(layout.size))
