"""DP-SGD inside a fused pass (arXiv 1607.00133): every row's gradient is clipped and added up.

No value leaves the device. Tensor suffixes: A active job, S slot of a pass (a row of text), P trained value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from fedllm.engine.device_trial import stands_trial
from fedllm.engine.jobs import Job
from fedllm.engine.pass_buffer import PassBuffer


@dataclass(frozen=True, eq=False)
class SlotClips:
    """What the slots of a pass are clipped by, where the gradients are."""

    owners_S: torch.Tensor  # the job of each
    clips_S: torch.Tensor  # infinite where a job clips no examples
    sizes_S: torch.Tensor  # what a job's sum is divided by; 1 where the weights of its tokens do that
    private_S: torch.Tensor

    def lost(self, norms_S: torch.Tensor, sums_S: torch.Tensor) -> torch.Tensor:
        """Return which slots hold a private gradient or loss that is no number, [S].

        They count as zero: a row then moves its job by at most the clip, like any row. If the job failed as a
        whole, that would tell that the row is there.
        """
        return self.private_S & torch.isfinite(norms_S + sums_S).logical_not()  # so one NaN is enough

    def factors(self, norms_S: torch.Tensor, lost_S: torch.Tensor) -> torch.Tensor:
        """Return what every slot's gradient is multiplied by in its job's mean, [S]."""
        # A gradient of zero has no direction to keep; 1e-30 only keeps it from becoming NaN.
        factors_S = (self.clips_S / norms_S.clamp(min=1e-30)).clamp(max=1.0) / self.sizes_S
        return factors_S.masked_fill(lost_S, 0.0)


def slot_clips(jobs: Sequence[Job], owners: Sequence[int], like: torch.Tensor) -> SlotClips:
    """Return what the slots of the jobs `owners` are clipped by, of the dtype and on the device of `like`."""
    of_slots = [jobs[owner] for owner in owners]
    dtype = str(like.dtype).removeprefix("torch.")
    arrays = {
        "owners_S": np.array(owners),
        "clips_S": np.array([job.example_clip or np.inf for job in of_slots], dtype),
        "sizes_S": np.array([job.training.batch_size if job.example_clip else 1 for job in of_slots], dtype),
        "private_S": np.array([job.noise is not None for job in of_slots]),
    }
    return SlotClips(**PassBuffer(arrays, like.device).tensors)


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

        new = partial(torch.tensor, device=device)
        factors_S, owners_S = new([0.5, 0.0, 2.0]), new([0, 0, 1])
        grads_SP = torch.ones(3, 1100, device=device)
        grads_SP[1], totals_AP = torch.nan, torch.ones(2, 1100, device=device)
        add_clipped_sum(totals_AP, grads_SP, factors_S, owners_S)
        return bool((totals_AP == new([[1.5], [3.0]])).all())

    return stands_trial(device, "the sum of clipped gradients", trial)
