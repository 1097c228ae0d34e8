"""The server's half of SCAFFOLD (`fedllm.engine.gradient_terms`): c, the mean of the clients' c_i.

Only accepted updates change c, and a client whose update was not accepted goes on from the c_i it had before:
c stays the mean whatever is lost on the way, up to rounding.

The mean is over `federation.num-clients`: those that never trained have c_i = 0. Where more clients than that
have trained, it is over all of these: nobody who joined is left out, and c is rescaled when one is added.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.messages import ClientUpdate
from fedllm.runs.checkpoint import ServerState


@dataclass(frozen=True, eq=False)
class ControlSum:
    """The running sum of the changes of c_i, in float64; `add` in a fixed order gives fixed bits."""

    sum_P: torch.Tensor

    def add(self, update: ClientUpdate) -> None:
        """Add the change that an accepted update brought."""
        assert update.control_delta is not None
        self.sum_P.add_(update.control_delta)

    def added_to(self, control: AdapterState, *, before: int, after: int) -> AdapterState:
        """Return the mean over `after` clients, `control` being the mean over `before` of them."""
        mean_P = control.vector.double() * (before / after) + self.sum_P / after
        return AdapterState(control.layout, mean_P.float())


def num_in_mean(num_clients: int, trained: Collection[str]) -> int:
    """Return over how many clients c is the mean, once those of `trained` have had an update accepted."""
    return max(num_clients, len(trained))


def empty_sum(layout: AdapterLayout) -> ControlSum:
    """Return the sum of no changes."""
    return ControlSum(torch.zeros(layout.size, dtype=torch.float64))


def control_of(state: ServerState) -> AdapterState:
    """Return c; before the first round it is zero."""
    layout = state.adapter.layout
    return state.control or AdapterState(layout, torch.zeros(layout.size))
