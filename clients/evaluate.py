"""What a node does with an evaluate request: the held-out loss of the clients it names."""

from dataclasses import replace

from clients.base_deltas import base_delta_store
from clients.data_holder import DataHolder
from clients.kept_vectors import LOCAL_B, PERSONAL, kept_vectors
from clients.personal import with_personal
from clients.train import start_of
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import WithheldError
from fedllm.messages import (
    ClientEvaluation,
    ClientFailure,
    EvaluateRequest,
)
from fedllm.models.with_base_delta import with_base_delta


def evaluate_clients(holder: DataHolder, request: EvaluateRequest) -> list[ClientEvaluation | ClientFailure]:
    """Return the held-out loss of every client the request names, in its order.

    Raises:
        WithheldError: the privacy plan keeps held-out losses with the clients.
    """
    if holder.plan.privacy is not None and holder.plan.privacy.metrics == "withheld":
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
    with with_base_delta(holder.engine.base, base_delta_store().keep(request.base_delta)):
        shared = {answer.client_id: answer for answer in holder.engine.evaluate(jobs)}
        answers.update(shared)
        if holder.plan.personal is not None and (
            holder.plan.privacy is None or holder.plan.privacy.metrics == "all"
        ):
            layout, numbers = request.adapter.layout, holder.plan.personal
            wide = [
                with_personal(job, kept[job.client_id][PERSONAL], layout, numbers)
                for job in jobs
                if PERSONAL in kept[job.client_id]
            ]
            for own in holder.engine.evaluate(wide):
                answers[own.client_id] = replace(shared[own.client_id], personal_loss=own.loss)
    return list(answers.values())
