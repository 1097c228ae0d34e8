"""What a node does with a request: train or evaluate the clients it names."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from clients.base_deltas import base_delta_store
from clients.control_variates import change_of, changed, corrected
from clients.data_holder import ClientTokens, DataHolder
from clients.kept_vectors import CONTROL, LOCAL_B, PERSONAL, keep_vectors, kept_vectors
from clients.personal import train_personal
from clients.privacy import charge_clients, check_request, private_job, protection_of, request_key, secret_of
from clients.protect import protect
from fedllm.adapters.layout import at_rank, with_rank
from fedllm.adapters.parts import part_of, whole_of
from fedllm.data.shards import draw_rows
from fedllm.engine.jobs import Job, Result
from fedllm.errors import NonFiniteError
from fedllm.messages import (
    ClientFailure,
    ClientUpdate,
    EvaluateRequest,
    TrainRequest,
)
from fedllm.models.chat import Encoded
from fedllm.models.with_base_delta import with_base_delta
from fedllm.seeds import derive_seed

_logger = logging.getLogger("fedllm.clients")


def train_clients(holder: DataHolder, request: TrainRequest) -> list[ClientUpdate | ClientFailure]:
    """Return one answer per client the request names, in its order.

    What clients keep for themselves is on disk before an answer is given: a client that cannot keep it fails.
    """
    answers: dict[str, ClientUpdate | ClientFailure] = {
        client_id: ClientFailure(client_id=client_id, code="no-data") for client_id in request.client_ids
    }
    drawn = {
        client_id: num_drawn
        for client_id, num_drawn in zip(request.client_ids, request.num_drawn, strict=True)
        if client_id in holder.clients and holder.clients[client_id].train
    }
    check_request(holder.plan, request)
    if holder.plan.privacy is not None and not holder.plan.privacy.is_central:
        spent = charge_clients(holder, holder.plan.privacy, request, drawn)
        answers.update(spent)
        drawn = {name: number for name, number in drawn.items() if name not in spent}
    kept = kept_vectors(holder, request, drawn)
    with with_base_delta(holder.engine.base, base_delta_store().keep(request.base_delta)):
        jobs = _private(holder, request, _jobs(holder, request, drawn, kept))
        for job, result in zip(jobs, holder.engine.train(jobs), strict=True):
            answers[job.client_id] = _answer(holder, request, job, result, kept[job.client_id])
        updates = {name: answer for name, answer in answers.items() if isinstance(answer, ClientUpdate)}
        trained = [job for job in jobs if job.client_id in updates]
        private = {job.client_id: _own_vectors(request, job, updates, kept) for job in trained}
        own = _personal_adapters(
            holder, request, {job.client_id: drawn[job.client_id] for job in trained}, kept
        )
    for client_id, vector in own.items():
        private[client_id][PERSONAL] = vector
    count = request.training.steps * request.training.batch_size
    answers.update(keep_vectors(holder, {name: number + count for name, number in drawn.items()}, private))
    return list(answers.values())


def _jobs(
    holder: DataHolder,
    request: TrainRequest,
    drawn: Mapping[str, int],
    kept: Mapping[str, Mapping[str, torch.Tensor]],
) -> list[Job]:
    """Return the work of every client that has rows."""
    ranks = dict(zip(request.client_ids, request.ranks, strict=True))
    jobs = [
        make_job(holder.clients[name], request, number, ranks[name], kept[name].get(LOCAL_B))
        for name, number in drawn.items()
    ]
    if request.control is None:
        return jobs
    control_P = request.control.vector
    return [corrected(job, control_P, own_control(kept[job.client_id], control_P)) for job in jobs]


def _private(holder: DataHolder, request: TrainRequest, jobs: list[Job]) -> list[Job]:
    """Return jobs as the privacy plan has them trained; it changes those of DP-SGD only."""
    plan = holder.plan.privacy
    if plan is None or not plan.is_by_example:
        return jobs
    secret = secret_of(holder)
    clients = [holder.clients[job.client_id] for job in jobs]
    return [
        private_job(job, client, plan, request_key(plan, request, client, secret))
        for job, client in zip(jobs, clients, strict=True)
    ]


def _answer(
    holder: DataHolder,
    request: TrainRequest,
    job: Job,
    result: Result,
    kept: Mapping[str, torch.Tensor],
) -> ClientUpdate | ClientFailure:
    """Return what leaves a client after its training."""
    change_P = None
    if result.gradient is not None:
        change_P = change_of(result, own_control(kept, result.gradient))
    rank = request.ranks[request.client_ids.index(job.client_id)]
    try:
        return protect(
            result,
            [row for batch in job.batches for row in batch],
            rank=rank,
            round_num=request.round_num,
            weighting=request.weighting,
            num_train=len(holder.clients[job.client_id].train),
            control_delta=change_P,
            protection=protection_of(
                holder, holder.plan.privacy, request, at_rank(request.adapter.layout, rank)
            ),
        )
    except NonFiniteError as error:
        _logger.warning("%s", error)
        return ClientFailure(client_id=job.client_id, code=error.code)


def _own_vectors(
    request: TrainRequest,
    job: Job,
    updates: Mapping[str, ClientUpdate],
    kept: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Return what a client keeps of its training for itself: its B where B is local, its control variate."""
    update, vectors = updates[job.client_id], {}
    if request.local_b:
        layout = request.adapter.layout
        after = with_rank(job.start + update.delta, at_rank(layout, update.rank), layout.rank)
        vectors[LOCAL_B] = part_of(layout, after, "b")
    if update.control_delta is not None:
        own_P = own_control(kept[job.client_id], update.control_delta)
        vectors[CONTROL] = changed(own_P, update.control_delta, request.codec)
    return vectors


def own_control(kept: Mapping[str, torch.Tensor], like_P: torch.Tensor) -> torch.Tensor:
    """Return a client's control variate; before its first round it is zero."""
    return kept[CONTROL] if CONTROL in kept else torch.zeros(like_P.shape)


def _personal_adapters(
    holder: DataHolder,
    request: TrainRequest,
    drawn: Mapping[str, int],
    kept: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Return the personal adapter of each client after this round, where the run has them.

    It is trained beside the whole shared adapter, which is what it is evaluated with, whatever part of that
    and at which rank the client trains.
    """
    if holder.plan.personal is None:
        return {}
    own = replace(
        request,
        training=holder.plan.personal.training(request.training),
        trained="both",
        ranks=(request.adapter.layout.rank,) * len(request.ranks),
        control=None,
    )
    return train_personal(
        holder.engine,
        _jobs(holder, own, drawn, kept),
        {name: vectors[PERSONAL] for name, vectors in kept.items() if PERSONAL in vectors},
        numbers=holder.plan.personal,
        seed=request.seed,
    )


def start_of(request: TrainRequest | EvaluateRequest, own_b: torch.Tensor | None) -> torch.Tensor:
    """Return the adapter [P] a client starts from: the server's, with its own B where B is local.

    FedSA-LoRA (arXiv 2410.01463) shares A; a client that has not trained yet has the server's B, which is
    that of the initial adapter.
    """
    start_P = request.adapter.vector
    if not request.local_b or own_b is None:
        return start_P
    return whole_of(request.adapter.layout, own_b, "b", rest_P=start_P)


def make_job(
    client: ClientTokens,
    request: TrainRequest,
    num_drawn: int,
    rank: int,
    own_b: torch.Tensor | None = None,
) -> Job:
    """Return a client's work in a round: the rows that follow those it has drawn, cut into local steps.

    It trains the first `rank` ranks of where it starts, with `own_b` where B is local and it has one.
    """
    layout = request.adapter.layout
    training = request.training
    drawn = draw_rows(
        len(client.train),
        seed=request.seed,
        client_id=client.client_id,
        start=num_drawn,
        count=training.steps * training.batch_size,
    )
    rows: list[Encoded] = [client.train[index] for index in drawn]
    size = training.batch_size
    batches = tuple(tuple(rows[step * size : (step + 1) * size]) for step in range(training.steps))
    seed = derive_seed(request.seed, "client", client.client_id, request.round_num)
    return Job(
        client.client_id,
        with_rank(start_of(request, own_b), layout, rank),
        batches,
        training,
        trained=request.trained,
        layout=at_rank(layout, rank),
        seed=seed,
    )
