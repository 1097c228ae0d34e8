"""What a node does with a request: train or evaluate the clients it names."""

import logging

import torch

from clients.drifts import drift_store
from clients.holder import ClientTokens, Holder
from clients.protect import protect
from fedllm.adapters.layout import at_rank, with_rank
from fedllm.data.shards import draw_rows
from fedllm.errors import NonFiniteError
from fedllm.models.chat import Encoded
from fedllm.models.drifted import drifted
from fedllm.seeds import derive_seed
from fedllm.training.jobs import EvaluationJob, Job
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
    """Return one answer per client the request names, in its order."""
    answers: dict[str, ClientUpdate | ClientFailure] = {
        client_id: ClientFailure(client_id=client_id, code="no-data") for client_id in request.client_ids
    }
    ranks = dict(zip(request.client_ids, request.ranks, strict=True))
    jobs = [
        make_job(holder.clients[client_id], request, num_drawn, ranks[client_id])
        for client_id, num_drawn in zip(request.client_ids, request.num_drawn, strict=True)
        if client_id in holder.clients and holder.clients[client_id].train
    ]
    with drifted(holder.engine.base, drift_store().keep(request.drift)):
        results = list(holder.engine.train(jobs))
    for job, result in zip(jobs, results, strict=True):
        try:
            answers[job.client_id] = protect(
                result,
                [row for batch in job.batches for row in batch],
                rank=ranks[job.client_id],
                round_num=request.round_num,
                weighting=request.weighting,
                num_train=len(holder.clients[job.client_id].train),
            )
        except NonFiniteError as error:
            _logger.warning("%s", error)
            answers[job.client_id] = ClientFailure(client_id=job.client_id, code=error.code)
    return list(answers.values())


def start_of(client_id: str, request: TrainRequest | EvaluateRequest) -> torch.Tensor:
    """Return the adapter [P] a client starts from: the server's, with the client's own B where B is local."""
    start_P = request.adapter.vector
    if not request.local_b:
        return start_P
    # HOOK read-out local-b (FedSA-LoRA, arXiv 2410.01463): take B from this client's private store, as in
    #     whole_of(layout, own_b, "b", rest_P=start_P)
    # and let `train` put part_of(layout, start + delta, "b") there. Without a store every round starts anew.
    return start_P


def make_job(client: ClientTokens, request: TrainRequest, num_drawn: int, rank: int) -> Job:
    """Return a client's work in a round: the rows that follow those it has drawn, cut into local steps.

    It trains the first `rank` ranks of where it starts.
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
        with_rank(start_of(client.client_id, request), layout, rank),
        batches,
        training,
        trained=request.trained,
        layout=at_rank(layout, rank),
        seed=seed,
    )


def evaluate(holder: Holder, request: EvaluateRequest) -> list[ClientEvaluation | ClientFailure]:
    """Return the held-out loss of every client the request names, in its order."""
    answers: dict[str, ClientEvaluation | ClientFailure] = {
        client_id: ClientFailure(client_id=client_id, code="no-data") for client_id in request.client_ids
    }
    jobs = [
        EvaluationJob(client_id, start_of(client_id, request), holder.clients[client_id].held_out)
        for client_id in request.client_ids
        if client_id in holder.clients and holder.clients[client_id].held_out
    ]
    with drifted(holder.engine.base, drift_store().keep(request.drift)):
        answers.update({answer.client_id: answer for answer in holder.engine.evaluate(jobs)})
    return list(answers.values())
