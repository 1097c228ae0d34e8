"""Who takes part: before the first round every node declares its clients, their sizes and base model."""

import time
from collections.abc import Callable

from fedllm.adapters.layout import AdapterLayout
from fedllm.config.run_config import RunConfig
from fedllm.errors import RunFailedError, WireError
from fedllm.messages import JoinedClient
from fedllm.wire.replies import read_error, read_joined
from strategies.grid.transport import Transport
from strategies.session import Session

REJOIN_SECONDS = 2.0  # how long a round waits for nodes that have just appeared
AGAIN_SECONDS = 30.0  # after which a node is asked again whose error may have passed
_PASSING = ("internal", "out-of-memory")  # the other errors are of the data or the policy, which stay


def join_clients(
    transport: Transport, config: RunConfig, layout: AdapterLayout, notice: Callable[[str], None]
) -> dict[str, JoinedClient]:
    """Wait until the expected clients have declared themselves; return the usable ones by id.

    Nodes are asked as they appear, so that one which hangs holds up no other. An answer that comes after the
    wait is taken before the next round (`rejoin`).

    Raises:
        RunFailedError: fewer than `federation.min-clients` are usable when the join deadline has passed.
    """
    federation = config.federation
    ends = time.monotonic() + federation.join_deadline
    declared: dict[str, JoinedClient] = {}
    while len(declared) < federation.num_clients and time.monotonic() < ends:
        transport.ask_to_join()
        new = _take_declared(transport, notice)
        for client in new:
            if client.client_id in declared:
                notice(f"two nodes declare client {client.client_id}; the second is left out")
            else:
                declared[client.client_id] = client
        if not new:  # else more may be waiting already
            time.sleep(transport.poll_seconds)
    if len(declared) < federation.num_clients:
        for node in sorted(transport.joining.values()):
            notice(f"node {node} has not answered yet; its clients take part once it does")
    # By name, so that nothing depends on who declared itself first.
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


def wait_for_nodes(session: Session) -> None:
    """Wait until as many clients as a round needs are on free nodes, for the join deadline at most.

    Clients that join meanwhile count.
    """
    federation = session.config.federation
    ends = time.monotonic() + federation.join_deadline
    while time.monotonic() < ends:
        rejoin(session)
        free = set(session.transport.node_ids())
        if sum(client.node_id in free for client in session.clients.values()) >= federation.min_clients:
            return
        time.sleep(session.transport.poll_seconds)


def rejoin(session: Session) -> None:
    """Add to the session the clients of nodes that have appeared since: late, or restarted.

    Nodes that have just appeared are waited for, `REJOIN_SECONDS` at most. One that answers later than that
    takes part from a later round on, and none is waited for twice.

    Without authentication a restarted node has a new id; its client moves to it if the old node is gone.
    """
    transport = session.transport
    new = transport.ask_to_join()
    ends = time.monotonic() + REJOIN_SECONDS
    _add_declared(session)
    while new & transport.joining.keys() and time.monotonic() < ends:
        time.sleep(transport.poll_seconds)
        _add_declared(session)


def _add_declared(session: Session) -> None:
    clients, notice = session.clients, session.watch.notice
    for client in _take_declared(session.transport, notice):
        known = clients.get(client.client_id)
        # A connected node keeps its clients; one that is gone was restarted under another id.
        if known is not None and known.node_id in set(session.transport.grid.get_node_ids()):
            notice(f"two nodes declare client {client.client_id}; the second is left out")
        elif _is_usable(client, session.config, session.layout, notice):
            notice(f"client {client.client_id} {'is back' if known else 'joined'}")
            clients[client.client_id] = client


def _take_declared(transport: Transport, notice: Callable[[str], None]) -> list[JoinedClient]:
    """Return the clients in the answers that have come since the last call.

    A node whose error may pass is asked again after a while; one that answered anything else is not.
    """
    declared = []
    for reply in transport.join_replies():
        if reply.content is None or read_error(reply.content) in _PASSING:  # busy now, usable later
            transport.asked[reply.node_id] = time.monotonic() + AGAIN_SECONDS
        try:
            declared += read_joined(reply.received(), reply.node_id)
        except WireError as error:
            notice(f"node {reply.node_id} did not join: {error}")
    return declared


def _is_usable(
    client: JoinedClient, config: RunConfig, layout: AdapterLayout, notice: Callable[[str], None]
) -> bool:
    if client.num_train == 0:
        notice(f"client {client.client_id} has no data and is left out")
        return False
    # The same names and shapes are not enough: a delta is one of certain base weights.
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
