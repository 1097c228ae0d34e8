"""An adapter of a client's own on top of the shared one: trained here, kept here, never sent.

A layer computes W x + s B_g A_g x + s B_p A_p x. After a client has trained the shared adapter of a round, it
trains its personal one for some steps on the same stream of rows, with the shared adapter *as received*
frozen underneath (the pattern of FDLoRA, arXiv 2406.07925, and FedDPA, arXiv 2403.19211). Both stand side by
side in one adapter of the ranks' sum (`fedllm.adapters.side_by_side`) of which only the second half may move.

dual    nothing holds the personal adapter back but the number of steps and weight decay
ditto   it is pulled to the shared adapter as in Ditto (arXiv 2012.04221): min f(v) + pull/2 ||v - shared||^2,
        with the distance measured on what the layers do. v - shared is s B_p A_p, whose squared Frobenius
        norm is the product form of FedProx (`fedllm.engine.gradient_terms`). It is a gradient, not a decay of
        the factors: it depends on their product alone, and Adam rescales it with the gradient of the loss

AdamW starts afresh every round. A personal adapter that diverged stays as it was before the round.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from clients.jobs import NodeRound, make_job
from clients.technique import Evaluations, Technique, Vectors, Works
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
    technique = Technique(
        name="personal adapter",
        kept={PERSONAL: personal_layout(layout, numbers).size},
        after=partial(_train_own, numbers),
    )
    if plan.privacy is not None and plan.privacy.metrics != "all":
        return technique
    return replace(technique, is_evaluated=True, measure=partial(_measure_own, numbers))


def _train_own(numbers: PersonalTraining, this_round: NodeRound, works: Works) -> Works:
    """Train the personal adapter of each client, and keep it.

    It goes on top of the whole shared adapter, which is what it is evaluated with, whatever part of that and
    at which rank the client trains.
    """
    own_round = replace(this_round, training=numbers.training(this_round.training), trained="both")
    rank = this_round.layout.rank
    trained = train_personal(
        this_round.holder.engine,
        [make_job(own_round, w.client, w.num_drawn, rank=rank, start_P=w.start_P) for w in works],
        {work.client.client_id: work.kept[PERSONAL] for work in works if PERSONAL in work.kept},
        numbers=numbers,
        seed=this_round.seed,
    )
    return [work.keeping(PERSONAL, trained[work.client.client_id]) for work in works]


def _measure_own(
    numbers: PersonalTraining,
    engine: Engine,
    jobs: Sequence[EvaluationJob],
    kept: Mapping[str, Vectors],
    measured: Evaluations,
) -> Evaluations:
    """Return the evaluations with the loss under each personal adapter there is."""
    wide = [
        with_personal(job, kept[job.client_id][PERSONAL], engine.layout, numbers)
        for job in jobs
        if PERSONAL in kept[job.client_id]
    ]
    losses = {own.client_id: own.loss for own in engine.evaluate(wide)}
    return {
        client_id: replace(shared, personal_loss=losses.get(client_id))
        for client_id, shared in measured.items()
    }


def personal_layout(layout: AdapterLayout, numbers: PersonalTraining) -> AdapterLayout:
    """Return the layout of the personal adapter beside a shared one of `layout`."""
    return at_rank(layout, numbers.rank)


def wide_layout(layout: AdapterLayout, numbers: PersonalTraining) -> AdapterLayout:
    """Return the layout of both side by side."""
    return at_rank(layout, layout.rank + numbers.rank)


def initial_personal(
    layout: AdapterLayout, numbers: PersonalTraining, seed: int, client_id: str
) -> torch.Tensor:
    """Return the personal adapter a client begins with: its own random A, and B zero, so no effect yet."""
    own_seed = derive_seed(seed, "personal", client_id)
    return initial_adapter(personal_layout(layout, numbers), own_seed).vector


def personal_jobs(
    shared: Sequence[Job], personal: Sequence[torch.Tensor], numbers: PersonalTraining
) -> Iterator[Job]:
    """Yield the work on each personal adapter; `shared` have the rows, the shared adapter and its layout."""
    masks: dict[AdapterLayout, torch.Tensor] = {}
    anchors: dict[int, torch.Tensor] = {}
    for job, personal_P in zip(shared, personal, strict=True):
        layout = _layout_of(job)
        if layout not in masks:
            masks[layout] = mask_of_second(layout, numbers.rank)
        if id(job.start) not in anchors:  # clients that share a start share what they are pulled to
            nothing = torch.zeros_like(personal_P)
            anchors[id(job.start)] = side_by_side(layout, job.start, nothing, numbers.rank)
        yield replace(
            job,
            start=side_by_side(layout, job.start, personal_P, numbers.rank),
            layout=wide_layout(layout, numbers),
            anchor=anchors[id(job.start)],
            movable=masks[layout],
            seed=derive_seed(job.seed, "personal"),
        )


def train_personal(
    engine: Engine,
    jobs: Sequence[Job],
    kept: Mapping[str, torch.Tensor],
    *,
    numbers: PersonalTraining,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the personal adapter of every job's client after one more round.

    `jobs` hold the rows, and the shared adapter with its layout; `kept` the personal adapters so far.
    """
    starts = [
        kept[job.client_id]
        if job.client_id in kept
        else initial_personal(_layout_of(job), numbers, seed, job.client_id)
        for job in jobs
    ]
    wide = list(personal_jobs(jobs, starts, numbers))
    trained = {}
    for job, start, result in zip(jobs, starts, engine.train(wide), strict=True):
        if not is_finite(result):
            _logger.warning("client %s: its personal adapter diverged and stays as it was", result.client_id)
            trained[result.client_id] = start
        else:
            moved = take_second(_layout_of(job), result.delta.float(), numbers.rank)
            trained[result.client_id] = start + moved
    return trained


def _layout_of(job: Job) -> AdapterLayout:
    assert job.layout is not None, "a job beside a personal adapter names the shared one's layout"
    return job.layout


def with_personal(
    job: EvaluationJob, personal_P: torch.Tensor, layout: AdapterLayout, numbers: PersonalTraining
) -> EvaluationJob:
    """Return the evaluation of a shared adapter of `layout` and a personal one together."""
    both = side_by_side(layout, job.vector, personal_P, numbers.rank)
    return EvaluationJob(job.client_id, both, job.rows, wide_layout(layout, numbers))
