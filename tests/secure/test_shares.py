"""Shamir's sharing: any threshold of shares gives the secret, fewer tell nothing."""

from itertools import combinations
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import SecureError, TooFewPartiesError
from fedllm.secure.agreement import Stream, secret_stream
from fedllm.secure.shares import combine, split


class Fixed:
    """A stream that draws given bytes."""

    def __init__(self, drawn: bytes):
        self.drawn = drawn

    def bytes(self, number: int) -> bytes:
        assert number == len(self.drawn)
        return self.drawn


def times(one: int, other: int) -> int:
    """Multiply two bytes in the field of AES bit by bit: the plain twin of the tables."""
    product = 0
    while other:
        product ^= one if other & 1 else 0
        one = (one << 1) ^ (0x11B if one & 0x80 else 0)
        other >>= 1
    return product


@settings(deadline=None, max_examples=40)
@given(data=st.data(), secret=st.binary(min_size=1, max_size=20), number=st.integers(1, 12))
def test_any_threshold_of_shares_gives_the_secret(data: st.DataObject, secret: bytes, number: int) -> None:
    threshold = data.draw(st.integers(1, number))
    shares = split(secret, threshold, number, secret_stream(b"machine", number))
    for chosen in combinations(range(number), threshold) if number < 6 else [range(threshold)]:
        assert combine({at + 1: shares[at] for at in chosen}, threshold) == secret
    last = range(number - threshold, number)
    assert combine({at + 1: shares[at] for at in last}, threshold) == secret


def test_shares_are_values_of_one_polynomial() -> None:
    secret, slope = 0x53, 0xCA
    points = [secret ^ times(slope, holder) for holder in range(1, 256)]
    drawn = bytes(points[:1])
    assert split(bytes([secret]), 2, 255, cast(Stream, Fixed(drawn)))[:, 0].tolist() == points


def test_shares_below_the_threshold_tell_nothing() -> None:
    """Whatever the secret, each single share takes all 256 values once over the 256 draws."""
    for secret in (b"\x00", b"\x01", b"\xa7"):
        drawn = [split(secret, 2, 5, cast(Stream, Fixed(bytes([each]))))[:, 0] for each in range(256)]
        assert all(sorted(column) == list(range(256)) for column in np.transpose(drawn))


def test_too_few_shares_are_refused() -> None:
    shares = split(b"secret", 3, 4, secret_stream(b"machine"))
    with pytest.raises(TooFewPartiesError, match="2 shares of a secret, and 3 are needed"):
        combine({1: shares[0], 2: shares[1]}, 3)


@pytest.mark.parametrize(("threshold", "number"), [(0, 3), (4, 3), (2, 256)])
def test_a_sharing_that_cannot_be_is_refused(threshold: int, number: int) -> None:
    with pytest.raises(SecureError, match="no sharing among"):
        split(b"secret", threshold, number, secret_stream(b"machine"))
