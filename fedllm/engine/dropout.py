"""Which inputs of an adapter are dropped: each row of tokens draws from a seed of its own.

So a client drops the same values whoever it shares a pass with. On a CPU a generator is made for each row and
matrix. On a GPU that would be thousands of small kernels: there one kernel computes the numbers of all rows
from what they are counted by (Philox4x32-10, Salmon et al. 2011: "Parallel random numbers: as easy as
1, 2, 3"), so the two kinds of device drop other values at the same rate.
Tensor suffixes: T token, I input feature, J four input features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from fedllm.engine.device_trial import stands_trial
from fedllm.engine.pass_buffer import Array

# Odd, so that no two matrices of a row get one seed: 2^64 / golden ratio, which spreads neighbours far apart.
_SEED_STRIDE = 0x9E3779B97F4A7C15
_LOW = 0xFFFFFFFF
_FACTORS, _KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # Philox's own


@dataclass(frozen=True)
class NoisyRow:
    """Tokens [begin, end) of the pass are one row; its values are dropped with probability `rate`."""

    begin: int
    end: int
    rate: float
    seed: int


@dataclass(frozen=True, eq=False)
class Drops:
    """The same for each token of a pass, on a device."""

    seeds_T: torch.Tensor  # of the token's row
    positions_T: torch.Tensor  # of the token in its row
    rates_T: torch.Tensor


@dataclass(frozen=True, eq=False)
class Noise:
    """What is dropped in a pass, as rows for a CPU and as tokens for another device."""

    rows: tuple[NoisyRow, ...]
    drops: Drops


def noisy_rows(
    begins: Sequence[int], lengths: Sequence[int], rates: Sequence[float], seeds: Sequence[int]
) -> tuple[NoisyRow, ...]:
    """Return the rows of a pass in which values are dropped."""
    rows = zip(begins, lengths, rates, seeds, strict=True)
    return tuple(NoisyRow(begin, begin + length, rate, seed) for begin, length, rate, seed in rows if rate)


def drop_arrays(rows: Sequence[NoisyRow], num_tokens: int) -> dict[str, Array]:
    """Return the arrays of `Drops` that a flat row lacks, by name; none where nothing is dropped."""
    if not rows:
        return {}
    seeds_T, rates_T = np.zeros(num_tokens, np.int64), np.zeros(num_tokens, np.float32)
    for row in rows:
        seeds_T[row.begin : row.end], rates_T[row.begin : row.end] = row.seed, row.rate
    return {"seeds_T": seeds_T, "rates_T": rates_T}


def keep_mask(noise: Noise, index: int, like_TI: torch.Tensor) -> torch.Tensor:
    """Return what multiplies the input of matrix `index`, like it: 0, or 1 / (1 - rate).

    (Inverted dropout, Srivastava et al. 2014, as PEFT's `lora_dropout`.)
    """
    if like_TI.device.type == "cpu":
        mask_TI = torch.ones_like(like_TI)
        for row in noise.rows:
            mask_TI[row.begin : row.end] = row_mask(row, index, like_TI)
        return mask_TI
    if like_TI.is_cuda and draws_as_a_cpu(like_TI.device):
        from fedllm.engine.triton.dropout import drop_mask

        drops = noise.drops
        return drop_mask(drops.seeds_T, drops.positions_T, drops.rates_T, index, like_TI)
    return counted_mask(noise.drops, index, like_TI)


def row_mask(row: NoisyRow, index: int, like_TI: torch.Tensor) -> torch.Tensor:
    """Return one row's mask at matrix `index`, [end - begin, I]."""
    if like_TI.device.type != "cpu":
        tokens_T = torch.arange(row.end - row.begin, device=like_TI.device)
        rates_T = torch.full(tokens_T.shape, row.rate, device=like_TI.device)
        drops = Drops(torch.full_like(tokens_T, row.seed), tokens_T, rates_T)
        return counted_mask(drops, index, like_TI[: len(tokens_T)])
    generator = torch.Generator(like_TI.device).manual_seed((row.seed + _SEED_STRIDE * index) % 2**63)
    size = (row.end - row.begin, like_TI.shape[1])
    # In float32 always, so that a model in any dtype drops the same values.
    drawn = torch.rand(size, generator=generator, device=like_TI.device)
    return (drawn >= row.rate).to(like_TI.dtype) / (1 - row.rate)


def counted_mask(drops: Drops, index: int, like_TI: torch.Tensor) -> torch.Tensor:
    """Return the mask of all rows at matrix `index`, [T, I], by operations that every device has."""
    num_tokens, width = like_TI.shape
    counts_J = torch.arange(-(-width // 4), device=like_TI.device)
    positions_T1, seeds_T1 = drops.positions_T[:, None], drops.seeds_T[:, None]
    counters = (counts_J, positions_T1, torch.full_like(positions_T1, index), torch.zeros_like(positions_T1))
    words = _philox((seeds_T1 & _LOW, (seeds_T1 >> 32) & _LOW), counters)
    drawn_TI = torch.stack(words, dim=-1).view(num_tokens, -1)[:, :width] >> 8  # 24 bits, as of a float32
    rates_T1 = drops.rates_T[:, None]
    is_kept_TI = drawn_TI.to(torch.float32) * 2.0**-24 >= rates_T1
    return (is_kept_TI / (1 - rates_T1)).to(like_TI.dtype)


def _philox(key: tuple[torch.Tensor, ...], counters: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return four random words of 32 bits for every counter of four, as int64."""
    (key0, key1), (c0, c1, c2, c3) = key, counters
    for _ in range(10):
        # int64 overflows, but the 64 bits of a product are right.
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1 = (second >> 32) & _LOW ^ c1 ^ key0, second & _LOW
        c2, c3 = (first >> 32) & _LOW ^ c3 ^ key1, first & _LOW
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return [c0, c1, c2, c3]


@lru_cache(maxsize=8)
def draws_as_a_cpu(device: torch.device) -> bool:
    """Return whether the kernel of the mask is right on a device, tried once."""

    def trial() -> bool:
        from fedllm.engine.triton.dropout import drop_mask

        tokens = torch.arange(3, device=device)
        drops = Drops(tokens * 2**40 + 5, tokens, torch.tensor([0.0, 0.3, 0.9], device=device))
        like_TI = torch.empty(3, 1030, device=device)
        found_TI = drop_mask(drops.seeds_T, drops.positions_T, drops.rates_T, 2, like_TI)
        return torch.equal(found_TI, counted_mask(drops, 2, like_TI))

    return stands_trial(device, "LoRA dropout", trial)
