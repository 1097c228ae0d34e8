"""Who takes part: before the first round every node declares its clients, their sizes and base model."""

import time
from collections.abc import Callable

from flwr.app import RecordDict

from fedllm.adapters.layout import AdapterLayout
from fedllm.config import RunConfig
from fedllm.errors import RunFailedError, WireError
from fedllm.types import JoinedClient
from fedllm.wire.replies import read_joined
from strategies.session import Session
from strategies.transport import Reply, Transport


def join_clients(
    transport: Transport, config: RunConfig, layout: AdapterLayout, notice: Callable[[str], None]
) -> dict[str, JoinedClient]:
    """Wait until the expected clients have declared themselves; return the usable ones by id.

    Raises:
        RunFailedError: fewer than `federation.min-clients` are usable when the join deadline has passed.
    """
    federation = config.federation
    ends = time.monotonic() + federation.join_deadline
    declared: dict[str, JoinedClient] = {}
    while len(declared) < federation.num_clients and time.monotonic() < ends:
        new = ask_new_nodes(transport, max(0.0, ends - time.monotonic()), notice)
        for client in new:
            if client.client_id in declared:
                notice(f"two nodes declare client {client.client_id}; the second is left out")
            else:
                declared[client.client_id] = client
        if not new:
            time.sleep(transport.poll_seconds)
    usable = {
        client_id: client
        for client_id, client in sorted(declared.items())
        if _is_usable(client, config, layout, notice)
    }
    if len(usable) < federation.min_clients:
        raise RunFailedError(
            f"{len(usable)} usable clients joined within {federation.join_deadline:g} s,"
            f" federation.min-clients = {federation.min_clients} are needed;"
            " check the data source and that the nodes run"
        )
    if len(declared) < federation.num_clients:
        notice(
            f"{len(declared)} of {federation.num_clients} expected clients joined; going on without the rest"
        )
    return usable


def rejoin(session: Session) -> None:
    """Add to the session the clients of nodes that have appeared since: late, or restarted.

    Without authentication a restarted node has a new id; its client moves to it if the old node is gone.
    """
    transport, clients = session.transport, session.clients
    connected = set(transport.grid.get_node_ids())
    for client in ask_new_nodes(transport, session.config.federation.join_deadline, session.watch.notice):
        known = clients.get(client.client_id)
        if known is not None and known.node_id in connected:
            session.watch.notice(f"two nodes declare client {client.client_id}; the second is left out")
        elif _is_usable(client, session.config, session.layout, session.watch.notice):
            session.watch.notice(f"client {client.client_id} {'is back' if known else 'joined'}")
            clients[client.client_id] = client


def ask_new_nodes(transport: Transport, deadline: float, notice: Callable[[str], None]) -> list[JoinedClient]:
    """Return what nodes that were not asked before declare, within `deadline` seconds."""
    new = [node for node in transport.node_ids() if node not in transport.asked]
    transport.asked.update(new)
    replies = transport.exchange(
        {node: RecordDict() for node in new}, message_type="query.join", group="join", deadline=deadline
    )
    return [client for reply in replies for client in _declared(reply, notice)]


def _declared(reply: Reply, notice: Callable[[str], None]) -> list[JoinedClient]:
    if reply.content is None:
        notice(f"node {reply.node_id} did not join: {reply.reason}")
        return []
    try:
        return read_joined(reply.content, reply.node_id)
    except WireError as error:
        notice(f"node {reply.node_id} did not join: {error}")
        return []


def _is_usable(
    client: JoinedClient, config: RunConfig, layout: AdapterLayout, notice: Callable[[str], None]
) -> bool:
    if client.num_train == 0:
        notice(f"client {client.client_id} has no data and is left out")
        return False
    if client.fingerprint != layout.fingerprint:
        notice(
            f"client {client.client_id} holds another base model ({client.fingerprint[:12]}) than the run"
            f" ({layout.fingerprint[:12]}) and is left out"
        )
        return False
    if config.train.control_variates and 0 < client.max_rank < layout.rank:
        notice(
            f"client {client.client_id} has room for rank {client.max_rank} only, and train.control-variates"
            f" needs the run's {layout.rank}: it is left out"
        )
        return False
    return True
