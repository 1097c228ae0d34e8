"""What a node does with a request: train or evaluate the clients it names."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from clients.control_variates import change_of, changed, corrected
from clients.holder import CONTROL, PERSONAL, ClientTokens, Holder
from clients.personal import local_training, train_personal, wide_layout, with_personal
from clients.protect import protect
from clients.store import load_private, save_private
from fedllm.data.shards import draw_rows
from fedllm.errors import CheckpointError, NonFiniteError
from fedllm.models.chat import Encoded
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
    kept = _kept(holder, drawn, holder.private_sizes(with_control=request.control is not None))
    jobs = [make_job(holder.clients[client_id], request, num_drawn) for client_id, num_drawn in drawn.items()]
    own: dict[str, torch.Tensor] = {}
    if request.control is not None:
        control_P = request.control.vector
        own = {name: kept.get(name, {}).get(CONTROL, torch.zeros_like(control_P)) for name in drawn}
        jobs = [corrected(job, control_P, own[job.client_id]) for job in jobs]
    for job, result in zip(jobs, holder.engine.train(jobs), strict=True):
        try:
            answers[job.client_id] = protect(
                result,
                [row for batch in job.batches for row in batch],
                round_num=request.round_num,
                weighting=request.weighting,
                num_train=len(holder.clients[job.client_id].train),
                control_delta=None if result.gradient is None else change_of(result, own[job.client_id]),
            )
        except NonFiniteError as error:
            _logger.warning("%s", error)
            answers[job.client_id] = ClientFailure(client_id=job.client_id, code=error.code)
    answers.update(_keep(holder, request, drawn, kept, answers))
    return list(answers.values())


def _kept(
    holder: Holder, drawn: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return what each client kept when it had drawn so many rows; clients without anything are left out."""
    if not sizes:
        return {}
    found = {name: load_private(holder.store, name, number, sizes) for name, number in drawn.items()}
    return {name: vectors for name, vectors in found.items() if vectors}


def _keep(
    holder: Holder,
    request: TrainRequest,
    drawn: Mapping[str, int],
    kept: Mapping[str, Mapping[str, torch.Tensor]],
    answers: Mapping[str, ClientUpdate | ClientFailure],
) -> dict[str, ClientFailure]:
    """Write what each client that has an update keeps for itself; return those that could not."""
    updates = {name: answer for name, answer in answers.items() if isinstance(answer, ClientUpdate)}
    vectors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in updates}
    for name, update in updates.items():
        if update.control_delta is not None:
            own = kept.get(name, {}).get(CONTROL, torch.zeros_like(update.control_delta))
            vectors[name][CONTROL] = changed(own, update.control_delta, request.codec)
    for name, vector in _personal_adapters(holder, request, {n: drawn[n] for n in updates}, kept).items():
        vectors[name][PERSONAL] = vector
    count, failed = request.training.steps * request.training.batch_size, {}
    for name in (name for name in updates if vectors[name]):
        try:
            save_private(holder.store, name, drawn[name] + count, vectors[name])
        except CheckpointError as error:
            _logger.error("%s", error)
            failed[name] = ClientFailure(client_id=name, code=error.code)
    return failed


def _personal_adapters(
    holder: Holder,
    request: TrainRequest,
    drawn: Mapping[str, int],
    kept: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Return the personal adapter of each client after this round, where the run has them."""
    if holder.personal is None:
        return {}
    numbers, layout = holder.personal, holder.engine.layout
    own = replace(request, training=local_training(request.training, numbers))
    return train_personal(
        holder.engine.companion(wide_layout(layout, numbers)),
        [make_job(holder.clients[client_id], own, num_drawn) for client_id, num_drawn in drawn.items()],
        {client_id: vectors[PERSONAL] for client_id, vectors in kept.items()},
        layout=layout,
        numbers=numbers,
        seed=request.seed,
    )


def make_job(client: ClientTokens, request: TrainRequest, num_drawn: int) -> Job:
    """Return a client's work in a round: the rows that follow those it has drawn, cut into local steps."""
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
    return Job(client.client_id, request.adapter.vector, batches, training, seed=seed)


def evaluate(holder: Holder, request: EvaluateRequest) -> list[ClientEvaluation | ClientFailure]:
    """Return the held-out loss of every client the request names, in its order."""
    answers: dict[str, ClientEvaluation | ClientFailure] = {
        client_id: ClientFailure(client_id=client_id, code="no-data") for client_id in request.client_ids
    }
    jobs = [
        EvaluationJob(client_id, request.adapter.vector, holder.clients[client_id].held_out)
        for client_id in request.client_ids
        if client_id in holder.clients and holder.clients[client_id].held_out
    ]
    answers.update({answer.client_id: answer for answer in holder.engine.evaluate(jobs)})
    if holder.personal is not None and request.num_drawn:
        drawn = dict(zip(request.client_ids, request.num_drawn, strict=True))
        answers.update(_with_personal_losses(holder, jobs, drawn, answers))
    return list(answers.values())


def _with_personal_losses(
    holder: Holder,
    jobs: Sequence[EvaluationJob],
    drawn: Mapping[str, int],
    answers: Mapping[str, ClientEvaluation | ClientFailure],
) -> dict[str, ClientEvaluation]:
    """Return the evaluations with the loss under shared and personal adapter, of clients that have one."""
    assert holder.personal is not None
    numbers, layout = holder.personal, holder.engine.layout
    asked = {job.client_id: drawn[job.client_id] for job in jobs}
    kept = _kept(holder, asked, holder.private_sizes())
    wide = [
        with_personal(job, kept[job.client_id][PERSONAL], layout, numbers)
        for job in jobs
        if job.client_id in kept
    ]
    measured = holder.engine.companion(wide_layout(layout, numbers)).evaluate(wide)
    found = {}
    for own in measured:
        answer = answers[own.client_id]
        assert isinstance(answer, ClientEvaluation)
        found[own.client_id] = replace(answer, personal_loss=own.loss)
    return found
