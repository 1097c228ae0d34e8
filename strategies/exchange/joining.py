"""Who takes part: before the first round every node declares its clients, their sizes and base model."""

import time
from collections.abc import Callable

from fedllm.adapters.layout import AdapterLayout
from fedllm.config.run_config import RunConfig
from fedllm.errors import PERMANENT_CAUSES, NoDataError, RunFailedError, WireError
from fedllm.messages import JoinedClient
from fedllm.wire.replies import read_error, read_joined
from strategies.exchange.causes import by_cause, few, grouped, in_words, names
from strategies.grid.transport import CRASHED, Reply, Transport
from strategies.session import SILENT, Session

REJOIN_SECONDS = 2.0  # how long a round waits for nodes that have just appeared
NO_ROWS = "no usable row; its log says how many were refused, or lost their answer to train.max-length"
AGAIN_SECONDS = 30.0  # after which a node is asked again whose error may have passed


def join_clients(
    transport: Transport,
    config: RunConfig,
    layout: AdapterLayout,
    notice: Callable[[str], None],
    phase: Callable[[str, int, int], None] = SILENT.phase,
) -> dict[str, JoinedClient]:
    """Wait until the expected clients have declared themselves; return the usable ones by id.

    Nodes are asked as they appear, so that one which hangs holds up no other. An answer that comes after the
    wait is taken before the next round (`rejoin`). The wait ends at once where every node has answered for
    good and none is missing.

    Raises:
        RunFailedError: fewer than `federation.min-clients` are usable then, or when the deadline has passed.
    """
    federation = config.federation
    with few(notice) as notice:
        declared = _wait_for_declared(transport, config, notice, phase)
        for node in transport.silent:
            notice(f"node {node} has not answered yet; its clients take part once it does")
        # By name, so that nothing depends on who declared itself first.
        usable, refused = {}, {}
        for client_id, client in sorted(declared.items()):
            reason = _refusal_of(client, config, layout)
            if reason:
                notice(f"client {client_id} {reason} and is left out")
                refused[f"client {client_id}"] = reason if client.num_train else NO_ROWS
            else:
                usable[client_id] = client
        if len(usable) >= federation.min_clients and len(declared) < federation.num_clients:
            notice(
                f"{len(declared)} of {federation.num_clients} expected clients joined;"
                " going on without the rest"
            )
    if len(usable) < federation.min_clients:
        nodes = {f"node {node}": transport.words_of(node) or why for node, why in transport.refused.items()}
        limit = f"within {federation.join_deadline:g} s"
        silent = {f"node {node}": f"no answer {limit}" for node in transport.silent}
        why = by_cause({**nodes, **refused, **silent}) or "check the data source and that the nodes run"
        waited = "" if nodes or refused or silent else f" {limit}"
        raise RunFailedError(
            f"{len(usable)} usable clients joined{waited},"
            f" federation.min-clients = {federation.min_clients} are needed; {why}"
        )
    return usable


def _wait_for_declared(
    transport: Transport,
    config: RunConfig,
    notice: Callable[[str], None],
    phase: Callable[[str, int, int], None],
) -> dict[str, JoinedClient]:
    """Return the clients declared until all are there, no more can be, or the join deadline has passed."""
    number, ends = config.federation.num_clients, time.monotonic() + config.federation.join_deadline
    declared: dict[str, JoinedClient] = {}
    phase("joining", 0, number)
    while len(declared) < number and time.monotonic() < ends:
        transport.ask_to_join()
        new = _take_declared(transport, notice)
        kept = [declared.setdefault(client.client_id, client) for client in new]
        _notice_twice([one.client_id for one, first in zip(new, kept, strict=True) if one != first], notice)
        if new:  # and more may be waiting already
            phase("joining", len(declared), number)
        else:
            if transport.have_all_answered(number, len(declared)):
                break
            time.sleep(transport.poll_seconds)
    return declared


def _notice_twice(clients: list[str], notice: Callable[[str], None]) -> None:
    if clients:
        notice(f"two nodes declare client {names(clients)}; the second is left out")


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
    clients, twice = session.clients, []
    with few(session.watch.notice) as notice:
        for client in _take_declared(session.transport, notice):
            known = clients.get(client.client_id)
            reason = _refusal_of(client, session.config, session.layout)
            # A connected node keeps its clients; one that is gone was restarted under another id.
            if known is not None and known.node_id in set(session.transport.grid.get_node_ids()):
                twice.append(client.client_id)
            elif reason:
                notice(f"client {client.client_id} {reason} and is left out")
            else:
                notice(f"client {client.client_id} {'is back' if known else 'joined'}")
                clients[client.client_id] = client
        _notice_twice(twice, notice)


def _take_declared(transport: Transport, notice: Callable[[str], None]) -> list[JoinedClient]:
    """Return the clients in the answers that have come since the last call.

    A node whose error may pass is asked again after a while; one that answered anything else is not.
    """
    declared, new = [], {}
    for reply in transport.join_replies():
        node, before = reply.node_id, transport.refused.pop(reply.node_id, "")
        try:
            clients = read_joined(reply.received(), node)
            why = "" if clients else in_words(NoDataError.code)
        except WireError as error:
            clients, code = [], read_error(reply.content) if reply.content is not None else None
            why = in_words(code) if code else str(error)
        declared += clients
        if why:
            transport.refused[node] = why
        if why and _may_pass(reply, is_repeated=why == before):
            transport.asked[node] = time.monotonic() + AGAIN_SECONDS
        if why and why != before:  # else it was said already
            new[f"node {node}"] = why
    for nodes, why in grouped(new):
        notice(f"{nodes} did not join: {why}")
    return declared


def _may_pass(reply: Reply, *, is_repeated: bool) -> bool:
    """Return whether a node that did not join may do so later: it was busy, say, or had no memory left.

    An error that nobody foresaw counts as passing once.
    """
    code = read_error(reply.content) if reply.content is not None else None
    if code == "internal" or reply.reason == CRASHED:
        return not is_repeated
    return code == "out-of-memory" or reply.content is None


def _refusal_of(client: JoinedClient, config: RunConfig, layout: AdapterLayout) -> str:
    """Return why a client cannot take part, "" where it can."""
    if client.num_train == 0:
        cause = PERMANENT_CAUSES.get(client.cause)
        return f"has no data to train on ({cause})" if cause else "has no data"
    # The same names and shapes are not enough: a delta is one of certain base weights.
    if client.fingerprint != layout.fingerprint:
        return (
            f"holds another base model ({client.fingerprint[:12]}) than the run ({layout.fingerprint[:12]})"
        )
    if config.train.control_variates and 0 < client.max_rank < layout.rank:
        return (
            f"has room for rank {client.max_rank} only, and train.control-variates needs the run's"
            f" {layout.rank},"
        )
    return ""
