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
    answers: dict[str, ClientUpdate | ClientFailure] = {
        client_id: ClientFailure(client_id=client_id, code="no-data") for client_id in request.client_ids
    }
    drawn = {
        client_id: num_drawn
        for client_id, num_drawn in zip(request.client_ids, request.num_drawn, strict=True)
        if client_id in holder.clients and holder.clients[client_id].train
    }
    unpaid = charge_clients(this_round, drawn)
    drawn = {client_id: number for client_id, number in drawn.items() if client_id not in unpaid}
    # Everything trains on the base model with the base delta, the techniques' own adapters too.
    with with_base_delta(holder.engine.base, holder.base_deltas.keep(request.base_delta)):
        works = prepare_clients(this_round, techniques, drawn)
        results = holder.engine.train([work.job for work in works])
        works = [replace(work, result=result) for work, result in zip(works, results, strict=True)]
        works, diverged = protect_clients(this_round, works, techniques)
    unsaved = save_kept(holder.store, works, this_round.training.steps * this_round.training.batch_size)
    updates = {work.client.client_id: work.sent for work in works}
    answers.update({**unpaid, **diverged, **updates, **unsaved})
    return list(answers.values())


def prepare_clients(
    this_round: NodeRound, techniques: Sequence[Technique], drawn: Mapping[str, int]
) -> Works:
    """Return the work of each client in `drawn`, which counts the rows it has drawn so far."""
    holder, works = this_round.holder, list[ClientWork]()
    for client_id, kept in load_kept(holder.store, techniques, drawn).items():
        client, number = holder.clients[client_id], drawn[client_id]
        start_P = start_of(techniques, this_round.request.adapter.vector, kept)
        job = make_job(this_round, client, number, rank=this_round.rank_of(client_id), start_P=start_P)
        works.append(ClientWork(client, number, start_P, kept, job))
    prepared: Works = works
    for technique in techniques:
        prepared = technique.prepare(this_round, prepared)
    return prepared
