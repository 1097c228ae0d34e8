"""The noise of DP-SGD on a step's mean gradients (arXiv 1607.00133), drawn where the gradients are.

On a CPU row by row; on a CUDA device for all rows at once by the kernels of `fedllm.privacy.triton_noise`,
with no value read back. A device is trusted only after its numbers were compared with the CPU's.
Tensor suffixes: A active job, B job of one rank, Q its trained values, P those at the widest rank, S step.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from fedllm.adapters.parts import part_size
from fedllm.engine.device_trial import stands_trial
from fedllm.engine.job_rows import JobRows
from fedllm.engine.jobs import StepNoise
from fedllm.privacy.keys import derived_key, keyed_hash
from fedllm.privacy.noise import SecretStream, gaussian


def step_noise(noise: StepNoise, step: int, mean_Q: torch.Tensor) -> torch.Tensor:
    """Return the noise [Q] of one step on the mean of its clipped gradients; the same mean, the same noise.

    Another mean has unrelated noise: of two means under one noise, the difference would be bare. Rounding is
    enough to make another, so a step done again on another device may not reuse what was drawn on the first.
    The hash of the mean under a key of the same secret is what the step's key makes the noise's key of: the
    first 32 bytes of the block of ChaCha20 that begins with it. While no two means have one hash (2^-66 for a
    pair), nobody can tell the noises of different means from independent ones.
    """
    mean_hash = keyed_hash(_hash_key(noise), mean_Q)
    key = SecretStream(_step_key(noise, step), mean_hash).integers(4).tobytes()
    return gaussian(SecretStream(key), mean_Q.numel(), noise.deviation)


def _hash_key(noise: StepNoise) -> bytes:
    return derived_key(noise.key, "hash")


def _step_key(noise: StepNoise, step: int) -> bytes:
    return derived_key(noise.key, "step", step)


@dataclass(frozen=True, eq=False)
class DeviceKeys:
    """What the kernels draw the noise of some jobs from, on their device; keys are words of 32 bits."""

    hash_keys_B8: torch.Tensor
    step_keys_SB8: torch.Tensor
    deviations_B: torch.Tensor

    def add(self, values_BQ: torch.Tensor, step: int) -> None:
        """Add the noise of a step to the first jobs' gradients, in place."""
        from fedllm.privacy.triton_noise import add_gaussian, keyed_hashes

        active = slice(0, len(values_BQ))
        hashes_B4 = keyed_hashes(self.hash_keys_B8[active], values_BQ)
        add_gaussian(self.step_keys_SB8[step, active], hashes_B4, self.deviations_B[active], values_BQ)


def device_keys(noises: Sequence[StepNoise], num_steps: int, device: torch.device) -> DeviceKeys:
    """Return the keys of the first steps of some jobs, copied to the device once."""

    def words(keys: Sequence[bytes]) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(b"".join(keys), dtype="<i4").copy()).to(device)

    steps = [_step_key(noise, step) for step in range(num_steps) for noise in noises]
    return DeviceKeys(
        words([_hash_key(noise) for noise in noises]).view(-1, 8),
        words(steps).view(num_steps, len(noises), 8),
        torch.tensor([noise.deviation for noise in noises], dtype=torch.float64, device=device),
    )


@dataclass(frozen=True, eq=False)
class _RankNoise:
    """The noise of the jobs of one rank; `rows` are theirs among the gradients, rising."""

    noises: tuple[StepNoise, ...]
    rows: tuple[int, ...]
    rows_B1: torch.Tensor
    places_Q: torch.Tensor | None  # of their own values in a row; None where they are all jobs, at one rank
    keys: DeviceKeys | None  # None where the noise is drawn on the CPU

    def add(self, grad_AP: torch.Tensor, step: int) -> None:
        """Add the noise of a step to the rows of these jobs that are still at work."""
        rows_B1 = self.rows_B1[: bisect_left(self.rows, len(grad_AP))]
        if not len(rows_B1):
            return
        values_BQ = grad_AP if self.places_Q is None else grad_AP[rows_B1, self.places_Q]  # or a copy
        if self.keys is not None:
            self.keys.add(values_BQ, step)
        else:
            for noise, values_Q in zip(self.noises, values_BQ, strict=False):  # the first are at work
                values_Q += step_noise(noise, step, values_Q).to(values_Q)
        if self.places_Q is not None:
            grad_AP[rows_B1, self.places_Q] = values_BQ


@dataclass(frozen=True, eq=False)
class StepNoises:
    """The noise of jobs trained side by side, those of one rank together; jobs without any are left out."""

    ranks: tuple[_RankNoise, ...]

    def add(self, grad_AP: torch.Tensor, step: int) -> None:
        """Add to the gradients of the first A jobs the noise they ask for, on the values they train."""
        for rank in self.ranks:
            rank.add(grad_AP, step)


def step_noises(rows: JobRows, device: torch.device) -> StepNoises:
    """Return the noise of all steps of jobs, its keys on `device`."""
    noisy = [row for row, job in enumerate(rows.jobs) if job.noise is not None]
    num_steps = max((len(rows.jobs[row].batches) for row in noisy), default=0)
    by_rank: dict[int, list[int]] = {}
    for row in noisy:
        by_rank.setdefault(rows.layouts[row].rank, []).append(row)
    found = []
    for rank, same in by_rank.items():
        places_Q = None
        if rank < rows.widest.rank or len(same) < len(rows.jobs):
            # At the jobs' own rank: the padded values are not trained, and noise there would be wasted.
            own_Q = torch.ones(part_size(rows.layouts[same[0]], rows.trained))
            places_Q = rows.pad_part(same[0], own_Q).nonzero()[:, 0].to(device)
        noises = tuple(noise for row in same if (noise := rows.jobs[row].noise) is not None)
        keys = None
        if device.type == "cuda" and draws_as_a_cpu(device):
            keys = device_keys(noises, num_steps, device)
        rows_B1 = torch.tensor(same, device=device)[:, None]
        found.append(_RankNoise(noises, tuple(same), rows_B1, places_Q, keys))
    return StepNoises(tuple(found))


@lru_cache(maxsize=8)
def draws_as_a_cpu(device: torch.device) -> bool:
    """Return whether a device draws the CPU's noise, tried once on two rows of 1,100 values.

    Wrong noise would not show in training, so where the numbers differ the CPU draws.
    """
    noises = (StepNoise(bytes(range(32)), 1.0), StepNoise(bytes(32), 2.0))
    mean_BQ = torch.linspace(-1, 1, 2_200).view(2, -1)

    def trial() -> bool:
        drawn = [step_noise(noise, 1, mean_Q) for noise, mean_Q in zip(noises, mean_BQ, strict=True)]
        found_BQ = mean_BQ.to(device, copy=True)
        device_keys(noises, 2, device).add(found_BQ, 1)
        return torch.allclose(found_BQ.cpu(), mean_BQ + torch.stack(drawn).float(), rtol=1e-6, atol=1e-6)

    return stands_trial(device, "the noise of private training", trial)
