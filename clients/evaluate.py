"""What a node does with an evaluate request: the held-out loss of the clients it names."""

from clients.coarse import coarse_evaluation
from clients.data_holder import DataHolder
from clients.jobs import load_kept
from clients.technique import Evaluations, start_of
from clients.techniques import techniques_of
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import WithheldError
from fedllm.messages import ClientEvaluation, ClientFailure, EvaluateRequest
from fedllm.models.with_base_delta import with_base_delta
from fedllm.site_policy import load_policy


def evaluate_clients(holder: DataHolder, request: EvaluateRequest) -> list[ClientEvaluation | ClientFailure]:
    """Return the held-out loss of every client the request names, in its order.

    Raises:
        WithheldError: the privacy plan keeps held-out losses with the clients.
    """
    if holder.plan.privacy is not None and holder.plan.privacy.metrics == "withheld":
        raise WithheldError("privacy.metrics = 'withheld': held-out losses stay with the clients")
    able = [name for name in request.drawn if name in holder.clients and holder.clients[name].held_out]
    # The others keep vectors (c_i, say) that evaluation would load for nothing.
    every = techniques_of(holder.plan, request.adapter.layout)
    techniques = [technique for technique in every if technique.is_evaluated]
    kept = load_kept(holder.store, techniques, {name: request.drawn[name] for name in able})
    jobs = []
    for name in able:
        start_P = start_of(techniques, request.adapter.vector, kept[name])
        # Clients that share the vector object share its row in the engine.
        jobs.append(EvaluationJob(name, start_P, holder.clients[name].held_out))
    with with_base_delta(holder.engine.base, holder.base_deltas.keep(request.base_delta)):
        measured: Evaluations = {answer.client_id: answer for answer in holder.engine.evaluate(jobs)}
        for technique in techniques:
            measured = technique.measure(holder.engine, jobs, kept, measured)
    if not load_policy().is_exact:
        measured = {name: coarse_evaluation(one) for name, one in measured.items()}
    return [measured.get(name, ClientFailure(client_id=name, code="no-data")) for name in request.drawn]
