"""What a node does with a request: train or evaluate the clients it names."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from clients.control_variates import change_of, changed, corrected
from clients.drifts import drift_store
from clients.holder import ClientTokens, Holder
from clients.personal import local_training, train_personal, with_personal
from clients.privacy import charge_clients, check_request, private_job, protection_of, request_key, secret_of
from clients.private import CONTROL, LOCAL_B, PERSONAL, keep_vectors, kept_vectors
from clients.protect import protect
from fedllm.adapters.layout import at_rank, with_rank
from fedllm.adapters.parts import part_of, whole_of
from fedllm.data.shards import draw_rows
from fedllm.errors import NonFiniteError, WithheldError
from fedllm.models.chat import Encoded
from fedllm.models.drifted import drifted
from fedllm.seeds import derive_seed
from fedllm.training.jobs import EvaluationJob, Job, Result
from fedllm.types import (
    ClientEvaluation,
    ClientFailure,
    ClientUpdate,
    EvaluateRequest,
    JoinedClient,
    TrainRequest,
)

_logger = logging.getLogger("fedllm.clients")


def join(holder: Holder, node_id: int) -> list[JoinedClient]:
    """Return what this node's clients declare: sizes and base model, no text."""
    return [
        JoinedClient(
            client_id=client.client_id,
            node_id=node_id,
            num_train=len(client.train),
            num_held_out=len(client.held_out),
            max_rank=holder.max_rank,
            fingerprint=holder.fingerprint,
        )
        for client in holder.clients.values()
    ]


def train(holder: Holder, request: TrainRequest) -> list[ClientUpdate | ClientFailure]:
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
    check_request(holder.config, holder.privacy, request)
    if holder.privacy is not None and not holder.privacy.is_central:
        spent = charge_clients(holder, holder.privacy, request, drawn)
        answers.update(spent)
        drawn = {name: number for name, number in drawn.items() if name not in spent}
    kept = kept_vectors(holder, request, drawn)
    with drifted(holder.engine.base, drift_store().keep(request.drift)):
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
    holder: Holder,
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


def _private(holder: Holder, request: TrainRequest, jobs: list[Job]) -> list[Job]:
    """Return jobs as the privacy plan has them trained; it changes those of DP-SGD only."""
    plan = holder.privacy
    if plan is None or not plan.is_by_example:
        return jobs
    secret = secret_of(holder)
    clients = [holder.clients[job.client_id] for job in jobs]
    return [
        private_job(job, client, plan, request_key(plan, request, client, secret))
        for job, client in zip(jobs, clients, strict=True)
    ]


def _answer(
    holder: Holder,
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
            protection=protection_of(holder, holder.privacy, request, at_rank(request.adapter.layout, rank)),
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
    holder: Holder,
    request: TrainRequest,
    drawn: Mapping[str, int],
    kept: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Return the personal adapter of each client after this round, where the run has them.

    It is trained beside the whole shared adapter, which is what it is evaluated with, whatever part of that
    and at which rank the client trains.
    """
    if holder.personal is None:
        return {}
    own = replace(
        request,
        training=local_training(request.training, holder.personal),
        trained="both",
        ranks=(request.adapter.layout.rank,) * len(request.ranks),
        control=None,
    )
    return train_personal(
        holder.engine,
        _jobs(holder, own, drawn, kept),
        {name: vectors[PERSONAL] for name, vectors in kept.items() if PERSONAL in vectors},
        numbers=holder.personal,
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


def evaluate(holder: Holder, request: EvaluateRequest) -> list[ClientEvaluation | ClientFailure]:
    """Return the held-out loss of every client the request names, in its order.

    Raises:
        WithheldError: the privacy plan keeps held-out losses with the clients.
    """
    if holder.privacy is not None and holder.privacy.metrics == "withheld":
        raise WithheldError("privacy.metrics = 'withheld': held-out losses stay with the clients")
    answers: dict[str, ClientEvaluation | ClientFailure] = {
        client_id: ClientFailure(client_id=client_id, code="no-data") for client_id in request.client_ids
    }
    drawn = dict(zip(request.client_ids, request.num_drawn or (0,) * len(request.client_ids), strict=True))
    drawn = {
        name: number
        for name, number in drawn.items()
        if name in holder.clients and holder.clients[name].held_out
    }
    kept = kept_vectors(holder, request, drawn)
    jobs = [
        EvaluationJob(name, start_of(request, kept[name].get(LOCAL_B)), holder.clients[name].held_out)
        for name in drawn
    ]
    with drifted(holder.engine.base, drift_store().keep(request.drift)):
        shared = {answer.client_id: answer for answer in holder.engine.evaluate(jobs)}
        answers.update(shared)
        if holder.personal is not None and (holder.privacy is None or holder.privacy.metrics == "all"):
            layout, numbers = request.adapter.layout, holder.personal
            wide = [
                with_personal(job, kept[job.client_id][PERSONAL], layout, numbers)
                for job in jobs
                if PERSONAL in kept[job.client_id]
            ]
            for own in holder.engine.evaluate(wide):
                answers[own.client_id] = replace(shared[own.client_id], personal_loss=own.loss)
    return list(answers.values())
