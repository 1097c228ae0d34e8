"""From jobs to rows of a bank: what a job brings as vectors of its own rank stands there at the bank's.

Tensor suffixes: C client, P flat adapter at the bank's rank.
"""

from collections.abc import Sequence

import torch

from fedllm.adapters.layout import AdapterLayout, with_rank
from fedllm.training.jobs import Job


def rows_of(
    jobs: Sequence[Job], vectors: Sequence[torch.Tensor], layout: AdapterLayout
) -> list[torch.Tensor]:
    """Return one vector a job, each of its job's own layout, at the rank of the bank's `layout`."""
    pairs = zip(jobs, vectors, strict=True)
    return [with_rank(vector, job.layout or layout, layout.rank) for job, vector in pairs]


def anchors_of(jobs: Sequence[Job], layout: AdapterLayout, begin_CP: torch.Tensor) -> torch.Tensor:
    """Return what FedProx pulls every row to, [C, P]: where it began, if its job names nothing else."""
    if all(job.anchor is None for job in jobs):
        return begin_CP
    anchors = [job.start if job.anchor is None else job.anchor for job in jobs]
    return torch.stack(rows_of(jobs, anchors, layout)).to(begin_CP)


def movable_of(jobs: Sequence[Job], layout: AdapterLayout, device: torch.device) -> torch.Tensor | None:
    """Return which values of every row may move, [C, P], or None where all may."""
    if all(job.movable is None for job in jobs):
        return None
    masks = [torch.ones_like(j.start, dtype=torch.bool) if j.movable is None else j.movable for j in jobs]
    return torch.stack(rows_of(jobs, masks, layout)).to(device)


def corrections_of(jobs: Sequence[Job], layout: AdapterLayout, like_CP: torch.Tensor) -> torch.Tensor | None:
    """Return what SCAFFOLD adds to every row's gradients, [C, P], or None where no job asks for it."""
    if all(job.correction is None for job in jobs):
        return None
    vectors = [torch.zeros_like(job.start) if job.correction is None else job.correction for job in jobs]
    return torch.stack(rows_of(jobs, vectors, layout)).to(like_CP)
