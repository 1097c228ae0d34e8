"""Distributed differential privacy: every party of a secret sum adds a share of the noise.

A party clips its update, counts it in whole steps of a grid and adds a discrete Gaussian (Kairouz, Liu &
Steinke 2021, arXiv 2102.06387). Whole numbers pass through masks unchanged, where floating-point noise would
not. Whoever sees the sum alone sees it with the noise of all that answered, and knows no share of it.

**How much noise.** With t answers, the fewest that are ever opened, the shares together protect as much as
N(0, (z C)^2) on a sum of updates of norm C. So epsilon is that of a server that adds the noise, and an answer
is charged alike. With all n answers the noise is sqrt(n / t) of that, about 1.22 at two thirds. Parties that
collude with the server know their own shares: c of them leave sqrt((t - c) / t) of it, or
sqrt((2 t - n - c + 1) / t) where the server tells parties different lists of who answered
(`fedllm.secure.masking`).

**Why that is enough.** Three things differ from one continuous Gaussian, and the shares make up for them:

- Rounding to the grid lengthens an update. It is drawn again until its norm is within a fixed bound, and that
  bound is the sensitivity, not C.
- A sum of n discrete Gaussians of variance v is not quite the discrete Gaussian of variance n v: chances of
  both differ by a factor within exp(+-5 sum_k exp(-2 pi^2 v k / (k + 1))), k from 1 to n - 1 (same paper).
- A discrete Gaussian of variance V is the result of a continuous one of variance V - s^2, rounded by a
  discrete Gaussian of deviation s about it, but for a factor within exp(+-5 exp(-2 pi^2 s^2)) (Poisson
  summation; the randomised rounding of Peikert 2010). What is made of a noised value costs no privacy, so the
  epsilon of the continuous one holds, which is computed exactly.

s makes all factors of a release, multiplied over its values, differ from 1 by 10^-20 at most. The multiplier
counts as 10^-9 less for them, enough for 10^8 releases. That a sum counts modulo 2^bits costs no privacy,
since it is made of the sum: one that wraps, with a chance of 2^-40, would only spoil its round.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from fedllm.errors import ConfigError
from fedllm.privacy.keys import derived_key
from fedllm.privacy.noise import SecretStream
from fedllm.privacy.noise_table import tabled_gaussian

_FINE = 8  # clip over sqrt(values), in steps: rounding then lengthens an update by 0.2 % at most
_COARSE = 1  # the least that is accepted, where it is by 12 %
_LEAST_DEVIATION = 4.0  # of a share, in steps: the second factor is then below 10^-60
_MARGIN = 1e-9  # of the multiplier
_GAP = 1e-20  # what all factors of a release may differ from 1
_LOG_CHANCE = 40 * math.log(2)  # of a rounding drawn again, and of a sum that wraps


@dataclass(frozen=True, kw_only=True)
class SharedNoise:
    """What one party adds, and the grid it counts in; the same numbers for all parties of a sum.

    `clip` is the norm C that its update is cut to and `step` the grid's. `squared_bound` bounds the squared
    norm of what it sends, before noise, and `variance` is that of its share, both in steps. The sum of
    `threshold` answers, the fewest that are opened, has noise of `multiplier` at least.
    """

    clip: float
    step: float
    squared_bound: int
    variance: int
    threshold: int
    num_values: int

    @property
    def multiplier(self) -> float:
        """The noise multiplier of a continuous Gaussian that protects no more than the noise of the sum."""
        left = self.threshold * self.variance - _smoothing(self.num_values)
        return math.sqrt(left / self.squared_bound) * (1 - _MARGIN)

    def largest(self, num_parties: int) -> float:
        """Return 10 deviations of the noise of so many, which a value exceeds with a chance of 10^-21."""
        return 10 * self.step * math.sqrt(num_parties * self.variance)


def shared_noise(
    z: float, clip: float, *, num_values: int, num_parties: int, threshold: int, bits: int
) -> SharedNoise:
    """Return the noise of each of `num_parties` that makes a multiplier of `z` with `threshold` answers.

    `bits` are those of the ring that the sum is counted in.

    Raises:
        ConfigError: its range is too small for so many parties or so much noise, or for so little.
    """
    together, values = num_parties / threshold, float(num_values)
    # A value's noise is as long as that many deviations with a chance of 2^-40 over all values.
    tail = math.sqrt(2 * (math.log(2 * values) + _LOG_CHANCE))
    smoothing = _smoothing(num_values)
    spare = tail * math.sqrt(together * smoothing + num_parties)  # what rounding up adds to the noise
    # All parties may have their whole norm in one value.
    longest = (2 ** (bits - 1) - 1 - spare) / (num_parties + tail * z * (1 + _MARGIN) * math.sqrt(together))
    least = math.ceil(max(_COARSE * math.sqrt(values), _LEAST_DEVIATION * math.sqrt(threshold) / z))
    wanted = max(math.ceil(_FINE * math.sqrt(values)), least)
    steps = min(wanted, _steps_within(longest, values))
    if steps < least:
        raise ConfigError(
            f"privacy.trust = 'distributed': a sum of {bits} bits has no room for the updates and noise of"
            f" {num_parties} clients at noise multiplier {z:.3g}; set a privacy.noise-multiplier nearer to 1,"
            " or fewer clients a round by federation.cohort"
        )
    squared_bound = math.floor(_squared_bound(steps, values))
    variance = math.ceil((z**2 * (1 + 3 * _MARGIN) * squared_bound + smoothing) / threshold)
    return SharedNoise(
        clip=clip,
        step=clip / steps,
        squared_bound=squared_bound,
        variance=variance,
        threshold=threshold,
        num_values=num_values,
    )


def noised_words(values_Q: np.ndarray, noise: SharedNoise, key: bytes) -> np.ndarray:
    """Return an update [Q] clipped, rounded to the grid and noised with one party's share, as uint32 words.

    A negative number is its remainder modulo 2^32. `key` belongs to this machine and to one sum: the same
    update gets the same noise under it, another one unrelated noise. A sum that is formed again must have
    another key, or the difference of both would have the noise of those alone that only one of them has.
    An update with NaN or infinity counts as zero.
    """
    values_Q = np.ascontiguousarray(values_Q, dtype=np.float64)
    # Under other numbers too it would be other noise over the same update, so they are named.
    names = (hashlib.sha256(values_Q.data).hexdigest(), repr(noise))
    whole_Q = rounded(values_Q, noise, SecretStream(derived_key(key, "rounding", *names)))
    stream = SecretStream(derived_key(key, "share of noise", *names))
    whole_Q += tabled_gaussian(stream, len(whole_Q), noise.variance)
    return whole_Q.astype(np.uint32)  # two's complement


def rounded(values_Q: np.ndarray, noise: SharedNoise, stream: SecretStream) -> np.ndarray:
    """Return an update [Q] clipped and in whole steps (int64) that it equals on average, within the bound.

    Every value goes up or down by a coin. Where the norm comes out above the bound all coins are tossed again
    ("conditional rounding"), which happens with a chance of 2^-40.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norm = float(np.linalg.norm(values_Q))
    scale = min(1.0, noise.clip / norm) / noise.step if 0 < norm < math.inf else 0.0
    scaled_Q = values_Q * scale if scale else np.zeros(len(values_Q))
    low_Q = np.floor(scaled_Q)
    chance_Q = (scaled_Q - low_Q) * 2.0**32
    while True:
        coins_Q = stream.integers((len(values_Q) + 1) // 2).view("<u4")[: len(values_Q)]
        whole_Q = low_Q.astype(np.int64) + (coins_Q < chance_Q)
        if int(np.dot(whole_Q, whole_Q)) <= noise.squared_bound:  # in whole numbers: nothing rounds it
            return whole_Q


def _squared_bound(steps: int, values: float) -> float:
    """Return what the squared norm of an update of `steps`, once rounded, exceeds with a chance of 2^-40."""
    likely = math.sqrt(2 * _LOG_CHANCE) * (steps + math.sqrt(values) / 2)
    return min(steps**2 + values / 4 + likely, (steps + math.sqrt(values)) ** 2)


def _steps_within(longest: float, values: float) -> int:
    """Return the most steps whose bound is `longest`, 0 where there are none: `_squared_bound` solved."""
    linear = math.sqrt(2 * _LOG_CHANCE)
    constant = values / 4 + linear * math.sqrt(values) / 2 - longest**2
    return math.floor((math.sqrt(linear**2 - 4 * constant) - linear) / 2) if longest > 0 > constant else 0


def _smoothing(num_values: int) -> float:
    """Return s^2: the variance by which the noise is larger than the continuous one that it stands for."""
    return math.log(5 * num_values / _GAP) / (2 * math.pi**2)
