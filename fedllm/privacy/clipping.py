"""Clipping a whole flat update to a norm: the one bound that every guarantee rests on.

The norm is of the vector that travels, over all tensors at once, in float64: clipping tensor by tensor would
allow sqrt(tensors) times as much. Whatever a peer sends, what comes out is finite and
no longer than the clip.
"""

import torch

SLACK = 1e-6  # what rounding to float32 may add to a norm, with room


def clipped(vector: torch.Tensor, clip: float) -> torch.Tensor:
    """Return `vector` [P] scaled to a norm of at most `clip`, as float32 on its device.

    A vector that holds NaN or infinity says nothing about where its owner wanted to go and becomes zero; a
    zero vector stays zero. A vector within the clip keeps its bits where it is float32.
    """
    if not bool(torch.isfinite(vector).all()):
        return torch.zeros_like(vector, dtype=torch.float32)
    narrow_P = vector.float()
    if float(torch.linalg.vector_norm(narrow_P.double())) <= clip:
        return narrow_P
    wide_P = vector.double()
    largest = float(wide_P.abs().max())  # 1e200 has a square that float64 has not
    scaled_P = wide_P / largest
    return (scaled_P * (clip * (1 - SLACK) / float(torch.linalg.vector_norm(scaled_P)))).float()


def is_within(vector: torch.Tensor, clip: float) -> bool:
    """Return whether an update that was clipped by its owner was within the clip before.

    One that was clipped arrives with a norm of `clip` up to the rounding of its payload, so up to 1 % below
    counts as clipped: adaptive clipping then estimates the quantile of 0.99 times the clip.
    """
    return float(torch.linalg.vector_norm(vector.double())) <= 0.99 * clip


def next_clip(clip: float, noised_share: float) -> float:
    """Return the clip of the next round: up or down towards the median of the norms.

    Geometric updates of Andrew et al. 2019 (arXiv 1905.03871): quantile 0.5, learning rate 0.2. The share of
    clients within the clip comes noised, so it may lie outside 0 to 1.
    """
    return float(clip * torch.exp(torch.tensor(-0.2 * (noised_share - 0.5), dtype=torch.float64)))
