"""Clipping, and noise from a cryptographic stream: Gaussian, discrete Gaussian and biased coins.

A stream is ChaCha20 (RFC 8439) under a key of `fedllm.privacy.keys`: without the key nobody can tell it from
chance, however much of it they see. Statistical generators promise no such thing: 624 outputs of a Mersenne
Twister give its state away.

Continuous noise is computed in float64 from 53-bit uniforms. Like every floating-point sampler it is not
exactly Gaussian in the last bits (Mironov 2012). Sums of updates are noised in float64 and then rounded to
float32, far above those bits. The gradients of DP-SGD are float32, and an attack on their last bits is not
covered. The discrete Gaussian is exact.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from fedllm.finite import all_finite

_CHUNK = 1 << 16  # pairs of values drawn at once: as many as the cache holds
_SLACK = 1e-6  # what rounding to float32 may add to a norm, with room


def clipped(vector: torch.Tensor, clip: float) -> torch.Tensor:
    """Return `vector` [P] scaled to a norm of at most `clip`, as float32 on its device.

    A vector with NaN or infinity has no direction and becomes zero. A float32 vector within the clip is
    returned as it is.
    """
    if not all_finite(vector):
        return torch.zeros_like(vector, dtype=torch.float32)
    narrow_P = vector.float()
    if float(torch.linalg.vector_norm(narrow_P.double())) <= clip:
        return narrow_P
    wide_P = vector.double()
    largest = float(wide_P.abs().max())  # divided out first: the square of 1e200 overflows float64
    scaled_P = wide_P / largest
    return (scaled_P * (clip * (1 - _SLACK) / float(torch.linalg.vector_norm(scaled_P)))).float()


def is_within(vector: torch.Tensor, clip: float) -> bool:
    """Return whether an update, as the server receives it, was shorter than the clip before it was clipped.

    A clipped update arrives with a norm of `clip` up to the rounding of its payload, so a norm of up to 1 %
    less counts as clipped. Adaptive clipping then estimates the quantile of 0.99 times the clip.
    """
    return float(torch.linalg.vector_norm(vector.double())) <= 0.99 * clip


def next_clip(clip: float, noised_share: float) -> float:
    """Return the clip of the next round, moved towards the median of the norms of updates.

    Geometric updates of Andrew et al. 2019 (arXiv 1905.03871): quantile 0.5, learning rate 0.2.
    `noised_share` is the share of clients within the clip; noise may put it outside 0 to 1.
    """
    return float(clip * torch.exp(torch.tensor(-0.2 * (noised_share - 0.5), dtype=torch.float64)))


class SecretStream:
    """The keystream of a 32-byte key. Every draw moves it on, so the order of draws matters.

    `start` is counter and nonce of the first block: 16 bytes.
    """

    def __init__(self, key: bytes, start: bytes = bytes(16)):
        self._cipher = Cipher(ChaCha20(key, start), mode=None).encryptor()

    def integers(self, number: int) -> np.ndarray:
        """Return `number` uniform 64-bit integers."""
        return np.frombuffer(self._cipher.update(bytes(8 * number)), dtype="<u8")

    def below(self, bound: int) -> int:
        """Return a uniform whole number from 0 to bound - 1."""
        num_bits = max(1, (bound - 1).bit_length())
        num_bytes = (num_bits + 7) // 8
        while True:
            drawn = int.from_bytes(self._cipher.update(bytes(num_bytes)), "little") >> (
                8 * num_bytes - num_bits
            )
            if drawn < bound:  # a remainder would make small numbers likelier, so others are drawn again
                return drawn


def gaussian(stream: SecretStream, size: int, deviation: float) -> torch.Tensor:
    """Return float64 noise [size] of N(0, deviation^2), independent values (Box & Muller 1958).

    Two neighbouring integers of the stream give two neighbouring values, so that a GPU can begin anywhere.
    """
    noise = torch.empty(size + size % 2, dtype=torch.float64)
    pairs = noise.view(-1, 2)
    for begin in range(0, len(pairs), _CHUNK):
        part = pairs[begin : begin + _CHUNK]
        uniform = torch.empty(2, len(part), dtype=torch.float64)
        # float64 has 53 bits of fraction
        np.copyto(uniform.numpy(), stream.integers(2 * len(part)).reshape(-1, 2).T >> 11, casting="unsafe")
        # From 1, not 0, so that the logarithm is finite.
        radius = uniform[0].add_(1.0).mul_(2.0**-53).log_().mul_(-2.0).sqrt_().mul_(deviation)
        angle = uniform[1].mul_(2.0**-53 * 2.0 * math.pi)
        torch.mul(radius, angle.cos(), out=part[:, 0])
        torch.mul(radius, angle.sin(), out=part[:, 1])
    return noise[:size]


def coins(stream: SecretStream, number: int, rate: float) -> list[bool]:
    """Return `number` independent coins, each true with probability `rate` (to 2^-64)."""
    return [int(drawn) < rate * 2.0**64 for drawn in stream.integers(number)]


def discrete_gaussian(stream: SecretStream, size: int, variance: Fraction) -> list[int]:
    """Return whole numbers with P(x) in proportion to exp(-x^2 / (2 variance)), exactly.

    Algorithms 1 to 3 of Canonne, Kamath & Steinke 2020 (arXiv 2004.00010), in rational arithmetic, so that no
    rounding can give a bit away. For masked sums, which add whole numbers.
    """
    return [_one_discrete(stream, variance) for _ in range(size)]


def _one_discrete(stream: SecretStream, variance: Fraction) -> int:
    scale = math.isqrt(variance.numerator // variance.denominator) + 1
    while True:  # a Laplace proposal of about the same width, thinned to a Gaussian
        drawn = _discrete_laplace(stream, scale)
        gap = Fraction(abs(drawn)) - variance / scale
        if _bernoulli_exp(stream, gap * gap / (2 * variance)):
            return drawn


def _discrete_laplace(stream: SecretStream, scale: int) -> int:
    while True:
        small = stream.below(scale)
        if not _bernoulli_exp(stream, Fraction(small, scale)):
            continue
        whole = 0
        while _bernoulli_exp(stream, Fraction(1)):
            whole += 1
        size = small + scale * whole
        negative = stream.below(2) == 1
        if size or not negative:  # else 0 would have two signs and twice its chance
            return -size if negative else size


def _bernoulli_exp(stream: SecretStream, rate: Fraction) -> bool:
    """Return true with probability exp(-rate)."""
    while rate > 1:  # exp(-rate) is exp(-1) times exp(-(rate - 1))
        if not _bernoulli_exp(stream, Fraction(1)):
            return False
        rate -= 1
    count = 1  # the first k whose coin of chance rate / k fails is odd with probability exp(-rate)
    while stream.below(rate.denominator * count) < rate.numerator:
        count += 1
    return count % 2 == 1
