"""An adapter of a client's own on top of the shared one: trained here, kept here, never sent.

A layer computes W x + s B_g A_g x + s B_p A_p x. After a client has trained the shared adapter of a round, it
trains its personal one for some steps on the same stream of rows, with the shared adapter *as received*
frozen underneath (the pattern of FDLoRA, arXiv 2406.07925, and FedDPA, arXiv 2403.19211). Both stand side by
side in one adapter, whose rank is the sum of theirs (`fedllm.adapters.side_by_side`); only the second half
may move.

dual    nothing holds the personal adapter back but the number of steps and weight decay
ditto   it is pulled to the shared adapter as in Ditto (arXiv 2012.04221): min f(v) + pull/2 ||v - shared||^2,
        with the distance measured on what the layers do: v - shared is s B_p A_p, and its squared Frobenius
        norm is the product form of FedProx (`fedllm.engine.gradient_terms`). It is a gradient, not a decay of
        the factors: it depends on their product alone, and Adam rescales it with the gradient of the loss

AdamW starts afresh every round. A personal adapter that diverged stays as it was before the round.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from clients.jobs import make_job
from clients.technique import Evaluations, NodeRound, Technique, Vectors, Works
from fedllm.adapters.layout import AdapterLayout, at_rank, initial_adapter
from fedllm.adapters.side_by_side import mask_of_second, side_by_side, take_second
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob, Job, is_finite
from fedllm.plan.run_plan import RunPlan
from fedllm.plan.training import PersonalTraining
from fedllm.seeds import derive_seed

PERSONAL = "personal"  # its name among the kept vectors
_logger = logging.getLogger("fedllm.clients")


def personal_adapter(plan: RunPlan, layout: AdapterLayout) -> Technique | None:
    """Return the technique, None where the run has no personal adapters.

    They are measured only where the privacy plan, if there is one, lets every number leave: their losses have
    no noise.
    """
    numbers = plan.personal
    if numbers is None:
        return None
    kept, train = {PERSONAL: at_rank(layout, numbers.rank).size}, partial(_train_own, numbers)
    technique = Technique(name="personal adapter", kept=kept, after=train)
    if plan.privacy is not None and plan.privacy.metrics != "all":
        return technique
    return replace(technique, is_evaluated=True, measure=partial(_measure_own, numbers))


def _train_own(numbers: PersonalTraining, this_round: NodeRound, works: Works) -> Works:
    """Train the personal adapter of each client, and keep it.

    It goes on top of the whole shared adapter, which is what it is evaluated with, whatever part of that and
    at which rank the client trains.
    """
    # Its rows are the round's: the same stream, drawn to the personal number of steps.
    own_round = replace(this_round, training=numbers.training(this_round.training), trained="both")
    layout, own = this_round.layout, {}
    for work in works:
        name = work.client.client_id
        if PERSONAL in work.kept:
            own[name] = work.kept[PERSONAL]
        else:
            own[name] = initial_personal(layout, numbers, this_round.seed, name)
    jobs = [make_job(own_round, w.client, w.num_drawn, rank=layout.rank, start_P=w.start_P) for w in works]
    trained = train_personal(this_round.holder.engine, layout, jobs, own, numbers)
    return [work.keeping(PERSONAL, trained[work.client.client_id]) for work in works]


def _measure_own(
    numbers: PersonalTraining,
    engine: Engine,
    jobs: Sequence[EvaluationJob],
    kept: Mapping[str, Vectors],
    measured: Evaluations,
) -> Evaluations:
    """Return the evaluations with the loss under each personal adapter there is."""
    own = [(job, kept[job.client_id].get(PERSONAL)) for job in jobs]
    wide = [with_personal(job, own_P, engine.layout, numbers) for job, own_P in own if own_P is not None]
    losses = {answer.client_id: answer.loss for answer in engine.evaluate(wide)}
    return {name: replace(one, personal_loss=losses.get(name)) for name, one in measured.items()}


def wide_layout(layout: AdapterLayout, numbers: PersonalTraining) -> AdapterLayout:
    """Return the layout of a shared adapter of `layout` and a personal one side by side."""
    return at_rank(layout, layout.rank + numbers.rank)


def initial_personal(
    layout: AdapterLayout, numbers: PersonalTraining, seed: int, client_id: str
) -> torch.Tensor:
    """Return the personal adapter a client begins with: its own random A, and B zero, so no effect yet."""
    own_seed = derive_seed(seed, "personal", client_id)
    return initial_adapter(at_rank(layout, numbers.rank), own_seed).vector


def personal_jobs(
    layout: AdapterLayout, shared: Sequence[Job], personal: Vectors, numbers: PersonalTraining
) -> Iterator[Job]:
    """Yield the job of each personal adapter; `shared` have the rows and the shared adapter, of `layout`."""
    movable = mask_of_second(layout, numbers.rank)  # the shared half keeps its bits, weight decay or not
    anchors: dict[int, torch.Tensor] = {}
    for job in shared:
        own_P = personal[job.client_id]
        if id(job.start) not in anchors:  # clients that share a start share what they are pulled to
            anchors[id(job.start)] = side_by_side(layout, job.start, torch.zeros_like(own_P), numbers.rank)
        yield replace(
            job,
            start=side_by_side(layout, job.start, own_P, numbers.rank),
            layout=wide_layout(layout, numbers),
            anchor=anchors[id(job.start)],
            movable=movable,
            seed=derive_seed(job.seed, "personal"),  # its own dropout masks
        )


def train_personal(
    engine: Engine, layout: AdapterLayout, shared: Sequence[Job], personal: Vectors, numbers: PersonalTraining
) -> dict[str, torch.Tensor]:
    """Return the personal adapter of every client after one more round; arguments as of `personal_jobs`."""
    after = {}
    for result in engine.train(list(personal_jobs(layout, shared, personal, numbers))):
        own_P, name = personal[result.client_id], result.client_id
        if is_finite(result):  # AdamW starts afresh, so one bad round need not spoil the next
            after[name] = own_P + take_second(layout, result.delta.float(), numbers.rank)
        else:
            _logger.warning("client %s: its personal adapter diverged and stays as it was", name)
            after[name] = own_P
    return after


def with_personal(
    job: EvaluationJob, personal_P: torch.Tensor, layout: AdapterLayout, numbers: PersonalTraining
) -> EvaluationJob:
    """Return the evaluation of a shared adapter of `layout` and a personal one together."""
    both = side_by_side(layout, job.vector, personal_P, numbers.rank)
    return EvaluationJob(job.client_id, both, job.rows, wide_layout(layout, numbers))
