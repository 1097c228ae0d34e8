"""Numbers as words of a ring, in which sums wrap around: what masks need to hide a value completely.

A value becomes a whole number of steps, modulo 2^bits. Arithmetic is that of uint32, of which the low `bits`
travel; since 2^bits divides 2^32, the bits above never matter. The step is as small as the sum of all parties
allows without wrapping around.
"""

import numpy as np

from fedllm.errors import SecureError
from fedllm.secure.agreement import Stream

BITS = 24
_CHUNK = (
    1 << 15
)  # words: as many as the cache holds; a multiple of 8, so that packed chunks end at whole bytes


def step_for(largest: float, num_parties: int, bits: int = BITS) -> float:
    """Return the step at which the sum of `num_parties` values of at most `largest` never wraps around.

    A party's word is at most top = (2^(bits - 1) - 1) // num_parties steps from 0: `largest` takes top - 1 of
    them, rounding one more.
    """
    top = ((1 << bits - 1) - 1) // num_parties
    if top < 2 or not 0 < largest < np.inf:
        raise SecureError(
            f"{num_parties} values up to {largest} have no sum in {bits} bits; use fewer parties"
        )
    return largest / (top - 1)


def quantise(values: np.ndarray, step: float | np.ndarray, stream: Stream) -> np.ndarray:
    """Return values [n] (float64) as words [n] (uint32) of `step`, one for all or one for each.

    Rounding is stochastic, up with the probability of the fraction, so that the sum of many is right on
    average. The caller keeps values within the range of `step_for`.

    Raises:
        SecureError: a value is not finite.
    """
    words = np.empty(len(values), np.uint32)
    steps = np.broadcast_to(step, values.shape)
    for begin in range(0, len(values), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        scaled = values[part] / steps[part]
        if not np.isfinite(scaled).all():
            raise SecureError("a value of the vector is not finite; nothing is sent")
        scaled += stream.words(len(scaled)) * 2.0**-32
        words[part] = (
            np.floor(scaled, out=scaled).astype(np.int64).astype(np.uint32)
        )  # negative ones wrap around
    return words


def value_of(words: np.ndarray, step: float | np.ndarray, bits: int = BITS) -> np.ndarray:
    """Return words [n] as values [n] (float64): the low `bits` as a signed number, times the step."""
    above = np.uint32(32 - bits)
    return ((words << above).view(np.int32) >> above) * np.asarray(step, np.float64)


def pack(words: np.ndarray, bits: int = BITS) -> bytes:
    """Return the low `bits` of words [n] (uint32), one after another: packed_size(n, bits) bytes."""
    parts = []
    for begin in range(0, len(words), _CHUNK):
        octets = words[begin : begin + _CHUNK].astype("<u4").view(np.uint8)
        every_bit = np.unpackbits(octets, bitorder="little").reshape(-1, 32)
        parts.append(np.packbits(every_bit[:, :bits], bitorder="little").tobytes())
    return b"".join(parts)


def unpack(data: bytes, size: int, bits: int = BITS) -> np.ndarray:
    """Return the words [size] (uint32) that `pack` packed.

    Raises:
        SecureError: the data has another length.
    """
    if len(data) != packed_size(size, bits):
        raise SecureError(f"a masked vector has {len(data)} bytes, not {packed_size(size, bits)}")
    octets, words = np.frombuffer(data, np.uint8), np.empty(size, np.uint32)
    for begin in range(0, size, _CHUNK):
        part = words[begin : begin + _CHUNK]
        packed = octets[begin * bits // 8 : packed_size(begin + len(part), bits)]
        wide = np.zeros((len(part), 32), np.uint8)
        wide[:, :bits] = np.unpackbits(packed, count=len(part) * bits, bitorder="little").reshape(-1, bits)
        part[:] = np.packbits(wide, bitorder="little").view("<u4")
    return words


def packed_size(size: int, bits: int = BITS) -> int:
    """Return the bytes of `size` packed words."""
    return (size * bits + 7) // 8
