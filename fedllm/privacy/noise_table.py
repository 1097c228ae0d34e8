"""The discrete Gaussian in bulk: exact, by one look into a table of its cumulative law.

`fedllm.privacy.noise.discrete_gaussian` draws the same law in rational arithmetic, some 50 microseconds a
value. Here a uniform number U of 63 bits falls between two entries of a table, and that settles the value,
whatever further bits U might have had. Only where U meets an entry are those bits drawn and compared with a
table of so many more bits. So no value is rounded, and nothing is left out at the tails.
"""

from bisect import bisect_left
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import accumulate

import numpy as np

from fedllm.privacy.noise import SecretStream

_TABLE_BITS = 63  # of 64 drawn, one is the sign
_MORE_BITS = 64  # drawn where those do not settle a value
_GUARD_BITS = 128  # of the arithmetic below the table's last bit


def tabled_gaussian(
    stream: SecretStream, size: int, variance: int, *, table_bits: int = _TABLE_BITS
) -> np.ndarray:
    """Return int64 values [size] with P(x) in proportion to exp(-x^2 / (2 variance)), exactly.

    Fewer `table_bits`, of at most 63, change no chance: more values take a second look.
    """
    drawn = stream.integers(size)
    uniform = drawn >> np.uint64(64 - table_bits)
    table = _table_array(variance, table_bits)
    values = np.searchsorted(table, uniform)  # the first entry that is not below
    for place in np.flatnonzero(table[values] == uniform):
        values[place] = _settled(stream, int(uniform[place]), table_bits, variance)
    # The lowest bit is none of the table's. Zero has one sign only: its chance is not that of a pair.
    return np.negative(values, out=values, where=(drawn & np.uint64(1)).astype(bool))


def _settled(stream: SecretStream, uniform: int, bits: int, variance: int) -> int:
    """Return the size of a value whose first `bits` bits are drawn and meet an entry of their table."""
    while True:
        uniform, bits = uniform << _MORE_BITS | int(stream.integers(1)[0]), bits + _MORE_BITS
        table = cumulative_table(variance, bits)
        value = bisect_left(table, uniform)
        if table[value] != uniform:
            return value


@lru_cache(maxsize=4)
def _table_array(variance: int, bits: int) -> np.ndarray:
    return np.array(cumulative_table(variance, bits), dtype=np.uint64)


@lru_cache(maxsize=8)
def cumulative_table(variance: int, bits: int) -> list[int]:
    """Return floor(2^bits P(|x| <= k)) for k = 0, 1, ... up to the first that is 2^bits - 1.

    A number u of `bits` bits stands for all U with u <= 2^bits U < u + 1. Where u is below entry k and above
    the one before, all of them give a value of size k.
    """
    precision = bits + _GUARD_BITS
    weights = _weights(variance, precision)
    # A product is rounded down by less than 1 unit: weight k then lacks less than 2 (k + 1)^2 units, and a
    # sum of them, with all that come after the last, less than this.
    error = 2 * (len(weights) + 2) ** 3
    masses = list(accumulate([weights[0], *(2 * weight for weight in weights[1:])]))
    table = []
    for mass in masses:
        least = (mass << bits) // (masses[-1] + error)
        most = min(((mass + error) << bits) // masses[-1], (1 << bits) - 1)  # P < 1
        if least != most:  # has a chance of about 2^-60 a table
            raise ArithmeticError(f"a discrete Gaussian of variance {variance}: too few guard bits")
        table.append(least)
        if least == (1 << bits) - 1:
            break
    return table


def _weights(variance: int, precision: int) -> list[int]:
    """Return exp(-k^2 / (2 variance)) for k = 0, 1, ..., in units of 2^-precision, until it is below one."""
    with localcontext() as context:
        context.prec = precision // 3 + 20  # decimal digits: 3.3 bits each
        unit = Decimal(1 << precision)
        factor = int((Decimal(-1) / (2 * variance)).exp() * unit)
    square = factor * factor >> precision
    weight, weights = 1 << precision, []
    while weight:  # the quotient of two weights is factor^(2 k + 1)
        weights.append(weight)
        weight, factor = weight * factor >> precision, factor * square >> precision
    return weights
