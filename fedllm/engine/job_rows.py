"""Stacks many clients' adapters into one matrix, padded to the largest rank, and splits the results again.

Padding adds zero rows to A and zero columns to B, which change nothing and get no gradient.
Tensor suffixes: C client, P trained values at the widest rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout, with_rank
from fedllm.adapters.parts import part_of, whole_of
from fedllm.engine.jobs import Job


@dataclass(frozen=True)
class JobRows:
    """Jobs that train the same part, a row each. `layouts` are their own."""

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

    def pad(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return one whole vector per job, each of its own layout, at the widest rank."""
        rank = self.widest.rank
        return [with_rank(v, layout, rank) for v, layout in zip(vectors, self.layouts, strict=True)]

    def stack(self, vectors: Sequence[torch.Tensor | None], default: float) -> torch.Tensor | None:
        """Return the trained part of one whole vector per job, [C, P]; None where no job has one.

        A job without a vector gets `default` in all places.
        """
        # The first that is there tells the dtype: booleans for what may move, floats for corrections.
        given = next((vector for vector in vectors if vector is not None), None)
        if given is None:
            return None
        starts = (job.start for job in self.jobs)
        # Filled at each job's own rank, so that what padding adds is zero for all alike.
        filled = [
            torch.full_like(start, default, dtype=given.dtype) if vector is None else vector
            for vector, start in zip(vectors, starts, strict=True)
        ]
        widest = self.widest
        return torch.stack([part_of(widest, vector, self.trained) for vector in self.pad(filled)])

    def pad_part(self, row: int, part_Q: torch.Tensor) -> torch.Tensor:
        """Return the trained part of one job at the widest rank, [P]."""
        layout, widest = self.layouts[row], self.widest
        whole = with_rank(whole_of(layout, part_Q, self.trained), layout, widest.rank)
        return part_of(widest, whole, self.trained)

    def unstack(self, row: int, values_P: torch.Tensor) -> torch.Tensor:
        """Return a row as a whole vector of its job's layout, zero where nothing is trained."""
        widest = self.widest
        return with_rank(whole_of(widest, values_P, self.trained), widest, self.layouts[row].rank)


def rows_of_jobs(jobs: Sequence[Job], layout: AdapterLayout) -> JobRows:
    """Return jobs as rows; `layout` stands for that of a job which names none."""
    return JobRows(tuple(jobs), tuple(job.layout or layout for job in jobs))
