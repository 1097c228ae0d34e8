"""What a node does with a train request: it trains the clients that the request names."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from clients.data_holder import DataHolder
from clients.jobs import NodeRound, make_job, plan_node_round
from clients.kept_vectors import load_kept, save_kept
from clients.privacy import charge_clients
from clients.protect import protect_clients
from clients.technique import ClientWork, Technique, Works, start_of
from clients.techniques import techniques_of
from fedllm.messages import ClientFailure, ClientUpdate, TrainRequest
from fedllm.models.with_base_delta import with_base_delta


def train_clients(
    holder: DataHolder, request: TrainRequest, *, weighting: str = ""
) -> list[ClientUpdate | ClientFailure]:
    """Return one answer per client the request names, in its order.

    What clients keep for themselves is on disk before an answer is given: a client that cannot keep it fails.
    `weighting` replaces the plan's own.
    """
    this_round = plan_node_round(holder, request, weighting=weighting)
    techniques = techniques_of(holder.plan, this_round.layout)
    able = [name for name in request.drawn if name in holder.clients and holder.clients[name].train]
    # The ledger is written before there is anything to account for: a crash can only count too much.
    unpaid = charge_clients(this_round, able)
    drawn = {name: request.drawn[name] for name in able if name not in unpaid}
    # Everything trains on the base model with the base delta, the techniques' own adapters too.
    with with_base_delta(holder.engine.base, holder.base_deltas.keep(request.base_delta)):
        works = prepare_clients(this_round, techniques, drawn)
        results = holder.engine.train([work.job for work in works])
        works = [replace(work, result=result) for work, result in zip(works, results, strict=True)]
        works, diverged = protect_clients(this_round, works, techniques)
    # After protection, since what a client keeps may depend on what has left it (SCAFFOLD's c_i).
    unsaved = save_kept(holder.store, works, this_round.training.steps * this_round.training.batch_size)
    updates = {work.client.client_id: work.sent for work in works}
    answers: dict[str, ClientUpdate | ClientFailure] = {**unpaid, **diverged, **updates, **unsaved}
    return [answers.get(name, ClientFailure(client_id=name, code="no-data")) for name in request.drawn]


def prepare_clients(
    this_round: NodeRound, techniques: Sequence[Technique], drawn: Mapping[str, int]
) -> Works:
    """Return the work of each client in `drawn`, which counts the rows it has drawn so far."""
    holder, request, begun = this_round.holder, this_round.request, []
    for name, kept in load_kept(holder.store, techniques, drawn).items():
        client, start_P = holder.clients[name], start_of(techniques, request.adapter.vector, kept)
        job = make_job(this_round, client, drawn[name], rank=request.ranks[name], start_P=start_P)
        begun.append(ClientWork(client, drawn[name], start_P, kept, job))
    works: Works = begun
    for technique in techniques:
        works = technique.prepare(this_round, works)
    return works
