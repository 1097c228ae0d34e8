"""The last messages of a run of secret sums: keys that end, and an adapter that a blind server is given."""

from dataclasses import replace

import numpy as np
import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.errors import FedLLMError, LayoutError, RunFailedError
from fedllm.runs.checkpoint import ServerState
from fedllm.wire.masks import UNMASK, read_openings, write_over
from fedllm.wire.shared import PUBLISH, RelayQuestion, write_relay_question
from strategies.session import Session


def publish_own(session: Session, state: ServerState) -> ServerState:
    """Return the state with the adapter that one of the parties gives away, where the server has had none.

    Raises:
        RunFailedError: none gives the one that all have reported; they keep it, and a resumed run asks again.
    """
    secure, last = session.plan.secure, state.records[-1].adapter if state.records else ""
    if secure is None or not secure.is_blind or last in ("", state.adapter.digest):
        return state
    for client in sorted(session.clients):
        found = _ask(session, client, state.round_num)
        if found is not None and found.digest == last:
            session.watch.notice(f"client {client} publishes the adapter of round {state.round_num}")
            return replace(state, adapter=found)
    raise RunFailedError(
        f"no party gives away the adapter of round {state.round_num}; --resume asks for it again"
    )


def _ask(session: Session, client: str, round_num: int) -> AdapterState | None:
    asked = RelayQuestion(kind=PUBLISH, round_num=round_num, clients=(client,))
    exchange = session.transport.exchange(
        {session.clients[client].node_id: write_relay_question(asked, session.plan.digest)},
        message_type=UNMASK,
        group=str(round_num),
        deadline=session.deadline(UNMASK),
    )
    for reply in exchange:
        try:
            opened, _ = read_openings(reply.received(), most=1)
            return _read(session.layout, opened.get(client, b""))
        except FedLLMError:  # the next party is asked
            return None
    return None


def _read(layout: AdapterLayout, data: bytes) -> AdapterState:
    if len(data) != 4 * layout.size:
        raise LayoutError("an adapter has another size than the run's")
    vector = np.frombuffer(data, "<f4").astype(np.float32)
    return AdapterState(layout, torch.from_numpy(vector)).checked_finite()


def end_keys(session: Session, state: ServerState) -> ServerState:
    """Tell all nodes that no further sum is to be opened, so that they remove the keys of the run.

    A node that does not hear of it keeps them until its owner clears the run's state.
    """
    if session.plan.secure is None:
        return state
    over = write_over(round_num=state.round_num, plan_digest=session.plan.digest)
    exchange = session.transport.exchange(
        dict.fromkeys(session.transport.node_ids(), over),
        message_type=UNMASK,
        group=str(state.round_num),
        deadline=session.deadline(UNMASK),
        is_enough=lambda: True,
    )
    for _ in exchange:  # what they answer says nothing
        pass
    return state
