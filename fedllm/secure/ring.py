"""Numbers as words of a ring, in which sums wrap around: what masks need to hide a value completely.

A value becomes a whole number of steps, modulo 2^bits. Arithmetic is that of uint32, of which the low `bits`
travel; since 2^bits divides 2^32, the bits above never matter. The step is as small as the sum of all parties
allows without wrapping around.
"""

from collections.abc import Iterator

import numpy as np

from fedllm.errors import SecureError
from fedllm.secure.agreement import Stream

BITS = 24
_CHUNK = 1 << 15  # words worked on at once: as many as the cache holds


def step_for(largest: float, num_parties: int, bits: int = BITS) -> float:
    """Return the step at which the sum of `num_parties` values of at most `largest` never wraps around.

    A party's word is at most top = (2^(bits - 1) - 1) // num_parties steps from 0: `largest` takes top - 1 of
    them, rounding one more.
    """
    top = ((1 << bits - 1) - 1) // num_parties
    if top < 2 or not 0 < largest < np.inf:
        raise SecureError(f"{num_parties} values up to {largest} have no sum in {bits} bits")
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
        whole = np.floor(scaled, out=scaled).astype(np.int64)
        words[part] = whole.astype(np.uint32)  # negative ones wrap around
    return words


def value_of(words: np.ndarray, step: float | np.ndarray, bits: int = BITS) -> np.ndarray:
    """Return words [n] as values [n] (float64): the low `bits` as a signed number, times the step."""
    above = np.uint32(32 - bits)
    return ((words << above).view(np.int32) >> above) * np.asarray(step, np.float64)


def pack(words: np.ndarray, bits: int = BITS) -> bytes:
    """Return the low `bits` (8 to 32) of words [n] (uint32), one after another."""
    wide = np.zeros((-(-len(words) // 8), 8), np.uint64)
    wide.reshape(-1)[: len(words)] = words & np.uint32((1 << bits) - 1)
    packed = bytearray(len(wide) * bits + 8)
    for begin in range(0, len(wide), _CHUNK // 8):
        part = wide[begin : begin + _CHUNK // 8]
        for place, octets, shift in _octets(packed, begin, len(part), bits):
            octets |= part[:, place] << shift
    return bytes(packed[: packed_size(len(words), bits)])


def unpack(data: bytes, size: int, bits: int = BITS) -> np.ndarray:
    """Return the words [size] (uint32) that `pack` packed.

    Raises:
        SecureError: the data has another length.
    """
    if len(data) != packed_size(size, bits):
        raise SecureError(f"a masked vector has {len(data)} bytes, not {packed_size(size, bits)}")
    words = np.empty((-(-size // 8), 8), np.uint32)
    packed = data + bytes(bits + 8)
    for begin in range(0, len(words), _CHUNK // 8):
        part = words[begin : begin + _CHUNK // 8]
        for place, octets, shift in _octets(packed, begin, len(part), bits):
            part[:, place] = octets >> shift
    words &= np.uint32((1 << bits) - 1)
    return words.reshape(-1)[:size]


def _octets(
    packed: bytes | bytearray, begin: int, number: int, bits: int
) -> Iterator[tuple[int, np.ndarray, np.uint64]]:
    """Yield, for each place in a group of 8 words, where those words lie in `number` groups from `begin` on.

    8 words fill exactly `bits` bytes, so the words of one place lie `bits` bytes apart. Each is read as a
    64-bit integer from its first byte on, in which it is shifted by the bits before it.
    """
    for place in range(8):
        octet, shift = divmod(place * bits, 8)
        yield place, np.ndarray(number, "<u8", packed, begin * bits + octet, (bits,)), np.uint64(shift)


def packed_size(size: int, bits: int = BITS) -> int:
    """Return the bytes of `size` packed words."""
    return (size * bits + 7) // 8
