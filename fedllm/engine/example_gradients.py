"""DP-SGD inside a fused pass (arXiv 1607.00133): every row's gradient is clipped and added up.

No value leaves the device. Tensor suffixes: A active job, S slot of a pass (a row of text), P trained value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fedllm.engine.device_trial import stands_trial
from fedllm.engine.jobs import Job


@dataclass(frozen=True, eq=False)
class SlotClips:
    """What the slots of a pass are clipped by, where the gradients are."""

    owners_S: torch.Tensor  # the job of each
    clips_S: torch.Tensor  # infinite where a job clips no examples
    sizes_S: (
        torch.Tensor
    )  # what the sum is divided by; those that are not clipped have it in their weights: 1
    private_S: torch.Tensor

    def lost(self, norms_S: torch.Tensor, sums_S: torch.Tensor) -> torch.Tensor:
        """Return which slots hold a private gradient or loss that is no number, [S].

        They count as zero: a row then moves its job by at most the clip, like any row. If the job failed as a
        whole, that would tell that the row is there.
        """
        return self.private_S & ~(torch.isfinite(norms_S) & torch.isfinite(sums_S.to(norms_S.device)))

    def factors(self, norms_S: torch.Tensor, lost_S: torch.Tensor) -> torch.Tensor:
        """Return what every slot's gradient is multiplied by in its job's mean, [S]."""
        # A gradient of zero has no direction to keep; 1e-30 only keeps it from becoming NaN.
        factors_S = (self.clips_S / norms_S.clamp(min=1e-30)).clamp(max=1.0) / self.sizes_S
        return factors_S.masked_fill(lost_S, 0.0)


def slot_clips(jobs: Sequence[Job], owners: Sequence[int], like: torch.Tensor) -> SlotClips:
    """Return what the slots of the jobs `owners` are clipped by, of the dtype and on the device of `like`."""
    values = torch.tensor([_clip_of(jobs[owner], owner) for owner in owners], dtype=torch.float64).view(-1, 4)
    if like.device.type == "cuda":  # from pinned memory the copy needs no waiting
        values = values.pin_memory().to(like.device, non_blocking=True)
    owners_S, clips_S, sizes_S, private_S = values.unbind(dim=1)
    return SlotClips(owners_S.long(), clips_S.to(like.dtype), sizes_S.to(like.dtype), private_S.bool())


def _clip_of(job: Job, owner: int) -> tuple[float, ...]:
    if not job.example_clip:
        return owner, float("inf"), 1.0, job.noise is not None
    return owner, job.example_clip, job.training.batch_size, job.noise is not None


def add_clipped(
    totals_AP: torch.Tensor,
    grads_SP: torch.Tensor,
    factors_S: torch.Tensor,
    owners_S: torch.Tensor,
    lost_S: torch.Tensor,
) -> None:
    """Add to every job's row its own slots' gradients, each times its factor; lost ones become zero."""
    device = grads_SP.device
    if device.type == "cuda" and sums_as_a_cpu(device):
        from fedllm.engine.triton.clipped_sum import add_clipped_sum

        add_clipped_sum(totals_AP, grads_SP, factors_S, owners_S)
        return
    if device.type == "cuda" or bool(lost_S.any()):  # a CPU is asked for nothing, and has nothing to write
        grads_SP.masked_fill_(lost_S[:, None], 0.0)
    factors_AS = factors_S.new_zeros(len(totals_AP), len(factors_S))
    factors_AS[owners_S, torch.arange(len(factors_S), device=device)] = factors_S
    # One product reads the gradients once. It also mixes 0 times a diverged client's gradient into its
    # neighbours', which are then trained again alone.
    totals_AP.addmm_(factors_AS, grads_SP)


@lru_cache(maxsize=8)
def sums_as_a_cpu(device: torch.device) -> bool:
    """Return whether the kernel of the clipped sum is right on a device, tried once."""

    def trial() -> bool:
        from fedllm.engine.triton.clipped_sum import add_clipped_sum

        grads_SP = torch.linspace(-1, 1, 3 * 1500, device=device).view(3, -1)
        factors_S, owners_S = (
            torch.tensor([0.5, 0.0, 2.0], device=device),
            torch.tensor([0, 0, 1], device=device),
        )
        found_AP, expected_AP = torch.ones(2, 1500, device=device), grads_SP[[0, 2]] * factors_S[[0, 2], None]
        add_clipped_sum(found_AP, grads_SP.index_fill(0, owners_S[2:], torch.nan), factors_S, owners_S)
        return torch.allclose(found_AP, 1 + expected_AP)

    return stands_trial(device, "the sum of clipped gradients", trial)
