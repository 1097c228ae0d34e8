"""The state of a finished run with another adapter in place of its own, measured by the clients."""

from dataclasses import replace

from fedllm.adapters.layout import AdapterState
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import OptimizerState
from strategies.exchange.evaluation import evaluate
from strategies.session import Session


def with_adapter(session: Session, state: ServerState, adapter: AdapterState) -> ServerState:
    """Return `state` with `adapter`; the record of its last round has the losses of the session's clients.

    What the run remembers of other clients, and of its own adapter, is gone.
    """
    drawn = {name: number for name, number in state.num_drawn.items() if name in session.clients}
    state = replace(state, adapter=adapter, num_drawn=drawn, optimizer=OptimizerState(), undistilled=None)
    last = replace(state.records[-1], adapter=adapter.digest)
    return replace(state, records=(*state.records[:-1], evaluate(session, state).noted_in(last)))
