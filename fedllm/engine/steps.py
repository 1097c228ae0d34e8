"""The local steps of many clients side by side: one gradient and one loss a client, then one optimizer step.

Tensor suffixes: C client, A client still at work, P trained value, S slot (client or example), B sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.example_gradients import add_noise, clip_factors, diverged, drop
from fedllm.engine.gradient_terms import ControlCorrection, control_correction, proximal_pull
from fedllm.engine.job_rows import JobRows, rows_of_jobs
from fedllm.engine.jobs import Job, row_seed
from fedllm.engine.optimizer import RowAdamW
from fedllm.engine.passes import Item, Passes, split
from fedllm.engine.token_budget import Limits


@dataclass(frozen=True, eq=False)
class Trained:
    """What side by side training gave, in rows that `rows` undoes."""

    rows: JobRows
    losses_SC: torch.Tensor  # [steps, C], in nats per learnt token; zero where a client has finished
    moved_CP: torch.Tensor  # after - before, on the CPU
    correction: ControlCorrection | None  # SCAFFOLD's sums of gradients, if any


def train_rows(passes: Passes, limits: Limits, jobs: Sequence[Job], layout: AdapterLayout) -> Trained:
    """Train jobs sorted by falling number of steps; `layout` stands for that of a job which names none."""
    bank = passes.bank
    rows = rows_of_jobs(jobs, layout)
    starts, scales = rows.pad([job.start for job in jobs]), [layout.scale for layout in rows.layouts]
    bank.load(rows.widest, starts, scales, rows.trained)
    begin_CP = bank.theta_CP.clone()  # the optimizer changes theta in place
    trainings = [job.training for job in jobs]
    movable_CP = rows.stack([job.movable for job in jobs], default=True)
    optimizer = RowAdamW(bank.theta_CP, trainings, movable_CP)
    anchors = rows.pad([job.start if job.anchor is None else job.anchor for job in jobs])
    pull = proximal_pull(bank, anchors, trainings)
    corrections_CP = rows.stack([job.correction for job in jobs], default=0.0)
    correction = control_correction(corrections_CP, bank.theta_CP, trainings)
    losses_SC = torch.zeros(len(jobs[0].batches), len(jobs), dtype=torch.float64)
    with passes.attached():
        for step in range(len(jobs[0].batches)):
            active = [job for job in jobs if step < len(job.batches)]
            grads, losses = step_gradients(passes, limits, active, step)
            add_noise(rows, grads, step)
            if correction is not None:
                correction.apply(grads)
            if pull is not None:
                pull.add_gradient(bank, grads)
            optimizer.step(grads)
            losses_SC[step, : len(active)] = losses
    return Trained(rows, losses_SC, (bank.theta_CP - begin_CP).cpu(), correction)


def step_gradients(
    passes: Passes, limits: Limits, jobs: Sequence[Job], step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient [A, P] and the mean token loss [A] of one step of every active job.

    The bank holds the jobs' adapters, in this order, and is attached to the model.
    """
    batches = [job.batches[step] for job in jobs]
    items: list[Item] = []
    for client, (job, batch) in enumerate(zip(jobs, batches, strict=True)):
        num_supervised = sum(row.num_supervised for row in batch)
        for number, row in enumerate(batch):
            weight = 1 / (row.num_supervised if job.example_clip else num_supervised)
            dropout = job.training.dropout
            seed = row_seed(job, step, number) if dropout else 0
            items.append(Item(row, client, client, weight, dropout, seed))
    num_supervised_A = torch.tensor([sum(row.num_supervised for row in batch) for batch in batches])
    num_supervised_A.clamp_(min=1)  # a batch drawn by coins may be empty
    if any(job.example_clip for job in jobs):
        grad_AP, losses_A = _clipped_gradients(passes, limits, jobs, items)
        return grad_AP, losses_A / num_supervised_A
    passes.bank.reserve(len(jobs))
    losses_A = torch.zeros(len(jobs), dtype=torch.float64)
    for part in split(items, limits.step):
        sums = passes.losses(part, backward=True, objective=jobs[0].objective)
        losses_A.index_add_(0, _owners(part), sums)
    return passes.bank.grad_SP, losses_A / num_supervised_A


def _clipped_gradients(
    passes: Passes, limits: Limits, jobs: Sequence[Job], items: Sequence[Item]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return per job the sum of its examples' gradients, each clipped, over its batch size [A, P], and
    its summed token loss [A].

    An example is a slot of one pass, so no more gradients are held than a pass has examples.
    """
    parts = list(split(items, limits.together, limits.rows))
    losses_A = torch.zeros(len(jobs), dtype=torch.float64)
    total_AP = torch.zeros_like(passes.bank.theta_CP[: len(jobs)])
    most = max(map(len, parts), default=0)
    while parts:
        part = parts.pop(0)
        passes.bank.reserve(most)
        slots = [replace(item, slot=slot) for slot, item in enumerate(part)]
        sums_B = passes.losses(slots, backward=True, objective=jobs[0].objective)
        grad_SP = passes.bank.grad_SP[: len(part)]
        norms_S = torch.linalg.vector_norm(grad_SP, dim=1)
        owners = [item.client for item in part]
        lost_S = diverged(jobs, owners, norms_S, sums_B)
        if len(part) > 1 and bool(lost_S.any()):
            # Some kernels mix 0 times a row's gradient into its neighbours', and 0 times NaN is NaN: what
            # one row is would decide about others, beyond its clip. Alone it can only lose itself.
            parts[:0] = [[item] for item in part]
            continue
        drop(lost_S, grad_SP, norms_S, sums_B)
        losses_A.index_add_(0, _owners(part), sums_B)
        # One product reads the gradients once. It also mixes 0 times a diverged client's gradient into
        # its neighbours', which are then trained again alone.
        total_AP.addmm_(clip_factors(jobs, owners, norms_S), grad_SP)
    return total_AP, losses_A


def _owners(items: Sequence[Item]) -> torch.Tensor:
    """Return the client of every sample, [B]."""
    return torch.tensor([item.client for item in items])
