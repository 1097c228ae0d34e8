"""From jobs to rows of a bank and back: vectors of each job's rank, as rows of one part at the widest rank.

Tensor suffixes: C client, P trained values at the widest rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout, with_rank
from fedllm.adapters.parts import part_of, whole_of
from fedllm.engine.jobs import Job


@dataclass(frozen=True)
class Rows:
    """Jobs that train the same part, side by side. `layouts` are their own."""

    jobs: tuple[Job, ...]
    layouts: tuple[AdapterLayout, ...]

    @property
    def widest(self) -> AdapterLayout:
        """The layout of the bank: that of the largest rank."""
        return max(self.layouts, key=lambda layout: layout.rank)

    @property
    def trained(self) -> str:
        """The part that all of them train."""
        return self.jobs[0].trained

    def widened(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return one whole vector a job, each of its own layout, at the widest rank."""
        rank = self.widest.rank
        return [with_rank(v, layout, rank) for v, layout in zip(vectors, self.layouts, strict=True)]

    def stacked(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the trained part of one whole vector a job, [C, P]."""
        widest = self.widest
        return torch.stack([part_of(widest, vector, self.trained) for vector in self.widened(vectors)])

    def whole(self, row: int, values_P: torch.Tensor) -> torch.Tensor:
        """Return a row as a whole vector of its job's layout, zero where nothing is trained."""
        widest = self.widest
        return with_rank(whole_of(widest, values_P, self.trained), widest, self.layouts[row].rank)


def rows_of(jobs: Sequence[Job], layout: AdapterLayout) -> Rows:
    """Return jobs side by side; `layout` is that of a job which names none."""
    return Rows(tuple(jobs), tuple(job.layout or layout for job in jobs))


def anchors_of(rows: Rows) -> list[torch.Tensor]:
    """Return what FedProx pulls each row to, whole: where it began, if its job names nothing else."""
    return rows.widened([job.start if job.anchor is None else job.anchor for job in rows.jobs])


def movable_of(rows: Rows) -> torch.Tensor | None:
    """Return which values of every row may move, [C, P], or None where all may."""
    if all(job.movable is None for job in rows.jobs):
        return None
    return rows.stacked(
        [
            torch.ones_like(job.start, dtype=torch.bool) if job.movable is None else job.movable
            for job in rows.jobs
        ]
    )


def corrections_of(rows: Rows) -> torch.Tensor | None:
    """Return what SCAFFOLD adds to every row's gradients, [C, P], or None where no job asks for it."""
    if all(job.correction is None for job in rows.jobs):
        return None
    return rows.stacked(
        [torch.zeros_like(job.start) if job.correction is None else job.correction for job in rows.jobs]
    )
