"""The state of a run that goes on without a client, its unlearnt adapter measured on the others' rows."""

from dataclasses import replace

from fedllm.adapters.layout import AdapterState
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import OptimizerState
from strategies.exchange.evaluation import evaluate
from strategies.session import Session


def without_client(session: Session, final: ServerState, adapter: AdapterState, client: str) -> ServerState:
    """Return the final state of a run with `adapter` in place of its own, and without `client`.

    The session has lost the client afterwards, so that nobody asks it again. The record of the last round has
    the losses of the new adapter.
    """
    session.clients.pop(client, None)
    state = replace(
        final,
        adapter=adapter,
        num_drawn={name: number for name, number in final.num_drawn.items() if name != client},
        optimizer=OptimizerState(),  # its moments know the client too
        undistilled=None,
    )
    record = replace(state.records[-1], adapter=adapter.digest)
    record = evaluate(session, state).noted_in(record)
    return replace(state, records=(*state.records[:-1], record))
