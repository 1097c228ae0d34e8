"""DP-SGD inside a fused pass (arXiv 1607.00133): every row's gradient is clipped, then their sum is noised.

Tensor suffixes: A active job, S slot of a pass (one row of tokens), P trained values, B sample of a pass.
"""

from collections.abc import Sequence
from functools import partial

import torch

from fedllm.adapters.parts import part_of
from fedllm.engine.job_rows import JobRows
from fedllm.engine.jobs import Job, StepNoise
from fedllm.privacy.keys import bits_digest, derived_key
from fedllm.privacy.noise import SecretStream, gaussian


def clip_factors(jobs: Sequence[Job], owners: Sequence[int], norms_S: torch.Tensor) -> torch.Tensor:
    """Return what every slot's gradient is multiplied by in its own job's mean, [A, S], zero in the others'.

    `owners` are the jobs of the slots. Those that are not clipped have the mean in their rows' weights: 1.
    """
    new = partial(torch.tensor, device=norms_S.device, dtype=norms_S.dtype)
    clip_S = new([jobs[owner].example_clip or float("inf") for owner in owners])
    size_S = new([jobs[owner].training.batch_size if jobs[owner].example_clip else 1 for owner in owners])
    factors_AS = norms_S.new_zeros(len(jobs), len(owners))
    columns = torch.arange(len(owners), device=norms_S.device)
    rows = torch.tensor(owners, device=norms_S.device)
    # A gradient of zero has no direction to keep; 1e-30 only keeps it from becoming NaN.
    factors_AS[rows, columns] = (clip_S / norms_S.clamp(min=1e-30)).clamp(max=1.0) / size_S
    return factors_AS


def diverged(
    jobs: Sequence[Job], owners: Sequence[int], norms_S: torch.Tensor, sums_B: torch.Tensor
) -> torch.Tensor:
    """Return which slots hold a gradient of a private job that is no number, [S] on the CPU."""
    private_S = torch.tensor([jobs[owner].noise is not None for owner in owners])
    if not bool(private_S.any()):
        return private_S
    return private_S & ~(torch.isfinite(norms_S) & torch.isfinite(sums_B)).cpu()


def drop(lost_S: torch.Tensor, grad_SP: torch.Tensor, norms_S: torch.Tensor, sums_B: torch.Tensor) -> None:
    """Count slots as zero, in place.

    A row then moves its job by at most the clip, like any row. If the job failed as a whole, that would tell
    that the row is there.
    """
    if bool(lost_S.any()):
        grad_SP[lost_S.to(grad_SP.device)] = 0.0
        norms_S[lost_S.to(grad_SP.device)] = 0.0
        sums_B[lost_S.to(grad_SP.device)] = 0.0


def add_noise(rows: JobRows, grad_AP: torch.Tensor, step: int) -> None:
    """Add to the gradients of the first A rows the noise their jobs ask for, on the values they train."""
    for row, job in enumerate(rows.jobs[: len(grad_AP)]):
        if job.noise is None:
            continue
        # At the job's own rank: the padded values are not trained, and noise there would be wasted.
        mean_Q = part_of(rows.layouts[row], rows.unstack(row, grad_AP[row]), job.trained)
        grad_AP[row] += rows.pad_part(row, step_noise(job.noise, step, mean_Q)).to(grad_AP)


def step_noise(noise: StepNoise, step: int, mean_Q: torch.Tensor) -> torch.Tensor:
    """Return the noise [Q] of one step on the mean of its clipped gradients; the same mean, the same noise.

    Another mean has unrelated noise: of two means under one noise, the difference would be bare. Rounding is
    enough to make another, so a step done again on another device may not reuse what was drawn on the first.
    """
    key = derived_key(noise.key, "step", step, bits_digest(mean_Q))
    return gaussian(SecretStream(key), mean_Q.numel(), noise.deviation)
