"""Who takes part: before the first round every node declares its clients, their sizes and base model."""

import time
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping

from fedllm.adapters.layout import AdapterLayout
from fedllm.errors import NoDataError, RunFailedError, WireError
from fedllm.messages import JoinedClient
from fedllm.plan.run_plan import RunPlan
from fedllm.secure.homomorphic import check_installed
from fedllm.wire.refusals import read_error
from strategies.cohort.voices import voice_of, with_places
from strategies.exchange.admission import Admission
from strategies.exchange.causes import by_cause, few, grouped, in_words, names
from strategies.grid.transport import CRASHED, Reply, Transport
from strategies.session import SILENT, Session
from strategies.sites import read_sites

REJOIN_SECONDS = 2.0  # how long a round waits for nodes that have just appeared
NO_ROWS = "no usable row; its log says how many were refused, or lost their answer to train.max-length"
AGAIN_SECONDS = 30.0  # after which a node is asked again whose error may have passed


def join_clients(
    transport: Transport,
    plan: RunPlan,
    layout: AdapterLayout,
    notice: Callable[[str], None],
    phase: Callable[[str, int, int], None] = SILENT.phase,
    left_out: Collection[str] = (),
) -> dict[str, JoinedClient]:
    """Wait until the expected clients have declared themselves; return those that take part by id.

    Nodes are asked as they appear, so that one which hangs holds up no other. An answer that comes after the
    wait is taken before the next round (`rejoin`). The wait ends at once where every node has answered for
    good and none is missing. Clients that are `left_out` are neither waited for nor taken.

    Raises:
        ConfigError: `federation.sites` names no list of sites.
        MissingExtraError: the run encrypts its sums, and this machine cannot add ciphertexts.
        RunFailedError: fewer than `federation.min-clients` are usable then, or when the deadline has passed.
    """
    federation = plan.config.federation
    if plan.config.secure.method == "he":
        check_installed()
    admission = Admission(plan, layout, read_sites(federation.sites), left_out)
    with few(notice) as notice:
        declared = _wait_for_declared(transport, admission, notice, phase)
        for node in transport.silent:
            notice(f"node {node} has not answered yet; its clients take part once it does")
        # By name, so that nothing depends on who declared itself first.
        usable, refused = {}, {}
        for client_id, client in sorted(declared.items()):
            reason = admission.refusal_of(client)
            if reason:
                notice(f"client {client_id} {reason} and is left out")
                refused[f"client {client_id}"] = reason if client.num_train else NO_ROWS
            else:
                usable[client_id] = client
        if len(usable) >= federation.min_clients and len(declared) < admission.num_expected:
            notice(
                f"{len(declared)} of {admission.num_expected} expected clients joined;"
                " going on without the rest"
            )
        placed = _placed(transport, admission, usable, notice)
        if warning := admission.warning_of(placed.values()):
            notice(warning)
    if len(placed) < federation.min_clients:
        nodes = {f"node {node}": transport.words_of(node) or why for node, why in transport.refused.items()}
        limit = f"within {federation.join_deadline:g} s"
        silent = {f"node {node}": f"no answer {limit}" for node in transport.silent}
        why = by_cause({**nodes, **refused, **silent}) or "check the data source and that the nodes run"
        waited = "" if nodes or refused or silent else f" {limit}"
        raise RunFailedError(
            f"{len(placed)} usable clients joined{waited},"
            f" federation.min-clients = {federation.min_clients} are needed; {why}"
        )
    return placed


def _wait_for_declared(
    transport: Transport,
    admission: Admission,
    notice: Callable[[str], None],
    phase: Callable[[str, int, int], None],
) -> dict[str, JoinedClient]:
    """Return the clients declared until all are there, no more can be, or the join deadline has passed."""
    federation = admission.plan.config.federation
    number, ends = admission.num_expected, time.monotonic() + federation.join_deadline
    declared: dict[str, JoinedClient] = {}
    phase("joining", 0, number)
    while not _is_full(transport, declared, number) and time.monotonic() < ends:
        transport.ask_to_join()
        new = _take_declared(transport, admission, declared, notice)
        declared |= new
        if new:  # and more may be waiting already
            phase("joining", min(len(declared), number), number)
        else:
            if transport.have_all_answered(number, len(declared)):
                break
            time.sleep(transport.poll_seconds)
    return declared


def _is_full(transport: Transport, declared: Mapping[str, JoinedClient], number: int) -> bool:
    """Return whether nobody who has still to answer can take a place from somebody who has more than one."""
    if len(declared) < number:
        return False
    return not transport.joining or len(set(map(voice_of, declared.values()))) >= number


def _placed(
    transport: Transport,
    admission: Admission,
    clients: Mapping[str, JoinedClient],
    notice: Callable[[str], None],
) -> dict[str, JoinedClient]:
    """Return the clients that have one of the run's places, and say who has none."""
    # A site of the list has as many clients as the list says; the nodes of a simulation are no sites.
    is_bounded = admission.sites is None and not transport.is_simulation()
    connected, number = set(transport.grid.get_node_ids()), admission.plan.config.federation.num_clients
    placed = with_places(clients, number, connected, is_bounded=is_bounded)
    if left := sorted(clients.keys() - placed.keys()):
        bound = ", and none has more than all others together" if is_bounded else ""
        turns = f"sites have federation.num-clients = {number} in turn"
        notice(f"client {names(left)}: no place; {turns}{bound}")
    return placed


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
    clients, transport = session.clients, session.transport
    admission = Admission(session.plan, session.layout, session.sites, session.left_out)
    with few(session.watch.notice) as notice:
        usable = {}
        for name, client in _take_declared(transport, admission, clients, notice).items():
            if reason := admission.refusal_of(client):
                notice(f"client {name} {reason} and is left out")
            else:
                usable[name] = client
        placed = _placed(transport, admission, {**clients, **usable}, notice)
        new = {name: client for name, client in placed.items() if name in usable}
        for name in new:
            notice(f"client {name} {'is back' if name in clients else 'joined'}")
        session.watch.joined_later(new)
        for name in clients.keys() - placed.keys():
            del clients[name]
        clients.update(placed)


def _take_declared(
    transport: Transport,
    admission: Admission,
    taken: dict[str, JoinedClient],
    notice: Callable[[str], None],
) -> dict[str, JoinedClient]:
    """Return the clients in the answers that have come since the last call, and may have their names.

    A node whose error may pass is asked again after a while; one that answered anything else is not.
    """
    declared: dict[str, JoinedClient] = {}
    new: dict[str, str] = {}
    left_out: dict[str, str] = {}
    connected = set(transport.grid.get_node_ids())
    for reply in transport.join_replies():
        node, before = reply.node_id, transport.refused.pop(reply.node_id, "")
        try:
            clients = admission.read(reply.received(), node, transport.nonces[node])
            why = "" if clients else in_words(NoDataError.code)
        except WireError as error:
            clients, code = [], read_error(reply.content) if reply.content is not None else None
            why = in_words(code) if code else str(error)
        for client in clients:
            if refused := admission.refusal_of_claim(client, ChainMap(declared, taken), connected):
                left_out[client.client_id] = refused
            else:
                declared[client.client_id] = client
        if why:
            transport.refused[node] = why
        if why and _may_pass(reply, is_repeated=why == before):
            transport.asked[node] = time.monotonic() + AGAIN_SECONDS
        if why and why != before:  # else it was said already
            new[f"node {node}"] = why
    for nodes, why in grouped(new):
        notice(f"{nodes} did not join: {why}")
    for clients_named, why in grouped(left_out):
        notice(f"client {clients_named}: {why}")
    return declared


def _may_pass(reply: Reply, *, is_repeated: bool) -> bool:
    """Return whether a node that did not join may do so later: it was busy, say, or had no memory left.

    An error that nobody foresaw counts as passing once.
    """
    code = read_error(reply.content) if reply.content is not None else None
    if code == "internal" or reply.reason == CRASHED:
        return not is_repeated
    return code == "out-of-memory" or reply.content is None
