"""Shamir's secret sharing of bytes: any `threshold` shares give the secret, fewer tell nothing (Shamir 1979).

Each byte is shared for itself by a random polynomial over the field of 256 elements, so many secrets are
shared at once as one longer one. Holder x (1, 2, ...) gets its values at x; the secret stands at 0.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from fedllm.errors import SecureError, TooFewPartiesError
from fedllm.secure.agreement import Stream

MOST_HOLDERS = 255


def split(secret: bytes, threshold: int, num_holders: int, stream: Stream) -> np.ndarray:
    """Return the shares [num_holders, bytes] (uint8) of a secret.

    The shares of the first threshold - 1 holders are drawn; with the secret they fix the polynomial, and so
    the others.
    """
    if not 1 <= threshold <= num_holders <= MOST_HOLDERS:
        raise SecureError(f"no sharing among {num_holders} holders of which {threshold} are needed")
    drawn = np.frombuffer(stream.bytes((threshold - 1) * len(secret)), np.uint8).reshape(-1, len(secret))
    known = np.concatenate([np.frombuffer(secret, np.uint8)[None], drawn])
    rest = _interpolated(known, tuple(range(threshold)), tuple(range(threshold, num_holders + 1)))
    return np.concatenate([drawn, rest])


def combine(shares: Mapping[int, np.ndarray], threshold: int) -> bytes:
    """Return the secret of shares [bytes], each by the number of its holder; further ones are not read.

    Raises:
        TooFewPartiesError: there are fewer than `threshold`.
    """
    if len(shares) < threshold:
        raise TooFewPartiesError(f"{len(shares)} shares of a secret, and {threshold} are needed")
    holders = tuple(sorted(shares)[:threshold])
    return _interpolated(np.stack([shares[holder] for holder in holders]), holders, (0,)).tobytes()


def _interpolated(known: np.ndarray, points: tuple[int, ...], wanted: tuple[int, ...]) -> np.ndarray:
    """Return the values [wanted, bytes] of the polynomials that have values `known` [points, bytes]."""
    values = np.zeros((len(wanted), known.shape[1]), np.uint8)
    for weights, row in zip(_weights(points, wanted).T, known, strict=True):
        values ^= np.take(_TIMES[weights], row, axis=1)
    return values


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...], wanted: tuple[int, ...]) -> np.ndarray:
    """Return Lagrange's weights [wanted, points]: products of (w - q) / (p - q) over other points q."""
    weights = np.ones((len(wanted), len(points)), np.uint8)
    for column, point in enumerate(points):
        for other in points:
            if other != point:
                inverse = _INVERSE[point ^ other]  # subtraction is exclusive or
                factors = _TIMES[np.array(wanted, np.uint8) ^ other, inverse]
                weights[:, column] = _TIMES[weights[:, column], factors]
    return weights


def _field() -> tuple[np.ndarray, np.ndarray]:
    """Return products [256, 256] and inverses [256] modulo x^8 + x^4 + x^3 + x + 1, as AES has them."""
    powers, value = [], 1
    for _ in range(255):  # 3 generates all elements but 0
        powers.append(value)
        value ^= (value << 1) ^ (0x11B if value & 0x80 else 0)
    logs = np.zeros(256, np.int64)
    logs[powers] = np.arange(255)
    products = np.array(powers, np.uint8)[(logs[:, None] + logs) % 255]
    products[0] = products[:, 0] = 0
    inverses = np.array(powers, np.uint8)[-logs % 255]
    return products, inverses


_TIMES, _INVERSE = _field()
