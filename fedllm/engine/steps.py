"""The local steps of many clients side by side: one gradient and one loss a client, then one optimizer step.

Tensor suffixes: C client, A client still at work, P trained value, S slot (client or example), B sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.example_gradients import add_clipped, slot_clips
from fedllm.engine.gradient_terms import ControlCorrection, control_correction, proximal_pull
from fedllm.engine.graphs import rounded
from fedllm.engine.interruption import step_begins
from fedllm.engine.job_rows import JobRows, rows_of_jobs
from fedllm.engine.jobs import Job, row_seed
from fedllm.engine.optimizer import RowAdamW
from fedllm.engine.passes import Item, Passes, split
from fedllm.engine.step_noise import step_noises
from fedllm.engine.token_budget import Limits


@dataclass(frozen=True, eq=False)
class PassLosses:
    """The summed token losses of a pass's samples [B], on its device, and the client of each."""

    clients: tuple[int, ...]
    sums_B: torch.Tensor


@dataclass(frozen=True, eq=False)
class Trained:
    """What side by side training gave, in rows that `rows` undoes."""

    rows: JobRows
    losses_SC: torch.Tensor  # [steps, C], in nats per learnt token; zero where a client has finished
    moved_CP: torch.Tensor  # after - before, on the CPU
    correction: ControlCorrection | None  # SCAFFOLD's sums of gradients, if any
    snapshots: list[dict[int, torch.Tensor]]  # of each job: steps -> after - before, on the CPU


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
    losses: list[list[PassLosses]] = []
    noises = step_noises(rows, bank.device)
    snapshots: list[dict[int, torch.Tensor]] = [{} for _ in jobs]
    with passes.attached():
        for step in range(len(jobs[0].batches)):
            step_begins(step, len(jobs[0].batches))
            active = [job for job in jobs if step < len(job.batches)]
            grads, of_passes = step_gradients(passes, limits, active, step)
            noises.add(grads, step)
            if correction is not None:
                correction.apply(grads)
            if pull is not None:
                pull.add_gradient(bank, grads)
            optimizer.step(grads)
            losses.append(of_passes)
            for row, job in enumerate(active):
                if step + 1 in job.snapshots:
                    snapshots[row][step + 1] = (bank.theta_CP[row] - begin_CP[row]).cpu()
    moved_CP = _on_host(bank.theta_CP - begin_CP)
    return Trained(rows, mean_losses(jobs, losses), moved_CP, correction, snapshots)


def _on_host(values_CP: torch.Tensor) -> torch.Tensor:
    """Return values on the CPU. A GPU writes to pinned memory several times faster than to any other."""
    if values_CP.device.type != "cuda":
        return values_CP.cpu()
    pinned_CP = torch.empty(values_CP.shape, dtype=values_CP.dtype, pin_memory=True)
    return pinned_CP.copy_(values_CP).clone()  # results may be kept, and pinned memory is dear


def mean_losses(jobs: Sequence[Job], losses: Sequence[Sequence[PassLosses]]) -> torch.Tensor:
    """Return the mean token losses [steps, C] from those of every step's passes, read in one copy."""
    passes = [one for of_step in losses for one in of_step]
    means_SC = torch.zeros(len(losses), len(jobs), dtype=torch.float64)
    if not passes:  # all batches were empty
        return means_SC
    all_B = torch.cat([one.sums_B for one in passes]).cpu()
    sums_B = iter(all_B.split_with_sizes([len(one.clients) for one in passes]))
    for step, (of_step, means_C) in enumerate(zip(losses, means_SC, strict=True)):
        for one in of_step:
            means_C.index_add_(0, torch.tensor(one.clients), next(sums_B))
        batches = [job.batches[step] if step < len(job.batches) else () for job in jobs]
        num_supervised_C = torch.tensor([sum(row.num_supervised for row in batch) for batch in batches])
        means_C.div_(num_supervised_C.clamp(min=1))  # a batch drawn by coins may be empty
    return means_SC


def step_gradients(
    passes: Passes, limits: Limits, jobs: Sequence[Job], step: int
) -> tuple[torch.Tensor, list[PassLosses]]:
    """Return the gradient [A, P] of one step of every active job, and the losses of its passes.

    The bank holds the jobs' adapters, in this order, and is attached to the model. Nothing is read back from
    a GPU, unless examples are private and the kernel mixes rows.
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
    if any(job.example_clip for job in jobs):
        return _clipped_gradients(passes, limits, jobs, items)
    passes.bank.reserve(len(jobs))
    losses = [
        PassLosses(_clients(part), passes.losses(part, backward=True, objective=jobs[0].objective))
        for part in split(items, limits.step)
    ]
    return passes.bank.grad_SP, losses


def _clipped_gradients(
    passes: Passes, limits: Limits, jobs: Sequence[Job], items: Sequence[Item]
) -> tuple[torch.Tensor, list[PassLosses]]:
    """Return per job the sum of its examples' gradients, each clipped, over its batch size [A, P], and
    the losses of the passes.

    An example is a slot of one pass, so no more gradients are held than a pass has examples.
    """
    bank = passes.bank
    parts = list(split(items, limits.together, limits.rows))
    losses: list[PassLosses] = []
    total_AP = torch.zeros_like(bank.theta_CP[: len(jobs)])
    most = max(map(len, parts), default=0)
    if passes.shelf is not None:  # so that steps of a few more or fewer examples are passes of one kind
        most = rounded(most, 16)
    while parts:
        part = parts.pop(0)
        bank.reserve(most)
        slots = [replace(item, slot=slot) for slot, item in enumerate(part)]
        sums_B = passes.losses(slots, backward=True, objective=jobs[0].objective)
        grad_SP = bank.grad_SP[: len(part)]
        norms_S = torch.linalg.vector_norm(grad_SP, dim=1)
        clips = slot_clips(jobs, [item.client for item in part], norms_S)
        lost_S = clips.lost(norms_S, sums_B)
        if not bank.kernel.keeps_rows_apart and len(part) > 1 and bool(lost_S.any()):
            # The kernel mixes 0 times a row's gradient into its neighbours', and 0 times NaN is NaN: what
            # one row is would decide about others, beyond its clip. Alone it can only lose itself.
            parts[:0] = [[item] for item in part]
            continue
        losses.append(PassLosses(_clients(part), sums_B.masked_fill(lost_S, 0.0)))
        add_clipped(total_AP, grad_SP, clips.factors(norms_S, lost_S), clips.owners_S, lost_S)
    return total_AP, losses


def _clients(items: Sequence[Item]) -> tuple[int, ...]:
    return tuple(item.client for item in items)
