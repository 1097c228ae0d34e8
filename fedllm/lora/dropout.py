"""LoRA dropout whose noise belongs to a row of tokens, whatever pass or process the row is in.

Every row draws its mask of a layer from a generator seeded by (client, step, row) and the layer, so a client
drops the same values fused or alone, and the backward pass draws them again instead of keeping them.
Tensor suffixes: T token, I input feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NoisyRow:
    """Tokens [begin, end) of the pass are one row; its values are dropped with probability `rate`."""

    begin: int
    end: int
    rate: float
    seed: int


def noisy_rows(lengths: Sequence[int], rates: Sequence[float], seeds: Sequence[int]) -> tuple[NoisyRow, ...]:
    """Return the rows of a pass that lie end to end; nothing where no row drops anything."""
    rows, begin = [], 0
    for length, rate, seed in zip(lengths, rates, seeds, strict=True):
        rows.append(NoisyRow(begin, begin + length, rate, seed))
        begin += length
    return tuple(rows) if any(rates) else ()


def keep_mask(rows: Sequence[NoisyRow], index: int, x_TI: torch.Tensor) -> torch.Tensor | None:
    """Return what multiplies the adapter's input at matrix `index`, [T, I]: 0, or 1 / (1 - rate).

    None where nothing is dropped. (Inverted dropout, Srivastava et al. 2014, as PEFT's `lora_dropout`.)
    """
    if not rows:
        return None
    mask_TI = torch.ones_like(x_TI)
    for row in rows:
        if row.rate:
            mask_TI[row.begin : row.end] = row_mask(row, index, x_TI)
    return mask_TI


def row_mask(row: NoisyRow, index: int, like_TI: torch.Tensor) -> torch.Tensor:
    """Return one row's mask [end - begin, I]; drawn in float32 so that every dtype drops the same values."""
    generator = torch.Generator(like_TI.device).manual_seed((row.seed + 0x9E3779B97F4A7C15 * index) % 2**63)
    size = (row.end - row.begin, like_TI.shape[1])
    drawn = torch.rand(size, generator=generator, device=like_TI.device)
    return (drawn >= row.rate).to(like_TI.dtype) / (1 - row.rate)
