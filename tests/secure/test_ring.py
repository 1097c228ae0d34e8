"""Words of a ring: packed and back at any width, rounded without bias, summed without wrapping around."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import SecureError
from fedllm.secure.agreement import secret_stream
from fedllm.secure.masking import plain_sum
from fedllm.secure.ring import BITS, pack, packed_size, quantise, step_for, unpack, value_of

STREAM = (b"secret", "rounding")


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(8, 32), size=st.integers(0, 70), seed=st.integers(0, 99))
def test_packing_keeps_the_low_bits(bits: int, size: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32)
    low = words & np.uint32(2**bits - 1)
    packed = pack(words, bits)
    assert len(packed) == packed_size(size, bits)
    as_number = sum(int(word) << (bits * place) for place, word in enumerate(low))  # the plain twin
    assert int.from_bytes(packed, "little") == as_number
    assert np.array_equal(unpack(packed, size, bits), low)


def test_packing_crosses_the_chunks_it_works_in() -> None:
    words = np.random.default_rng(0).integers(0, 2**24, (1 << 17) + 5, dtype=np.uint32)
    assert np.array_equal(unpack(pack(words), len(words)), words)


def test_packed_words_of_another_length_are_refused() -> None:
    with pytest.raises(SecureError, match="has 7 bytes, not 6"):
        unpack(bytes(7), 2)


@pytest.mark.parametrize("num_parties", [1, 2, 3, 64, 100])
def test_the_largest_sum_does_not_wrap_around(num_parties: int) -> None:
    largest = 0.0123
    step = step_for(largest, num_parties)
    for sign in (1, -1):
        words = quantise(np.full(1000, sign * largest), step, secret_stream(*STREAM, sign))
        total = value_of(plain_sum([words] * num_parties), step)
        assert np.allclose(total, sign * num_parties * largest, rtol=0, atol=num_parties * step * 1.001)


def test_a_step_is_about_as_small_as_it_may_be() -> None:
    for num_parties in (2, 10, 100):
        assert step_for(1.0, num_parties) < 1.0001 * num_parties / 2 ** (BITS - 1)


@pytest.mark.parametrize(("largest", "num_parties"), [(0.0, 3), (np.inf, 3), (np.nan, 3), (1.0, 2**22)])
def test_a_range_without_a_step_is_refused(largest: float, num_parties: int) -> None:
    with pytest.raises(SecureError, match="have no sum in 24 bits"):
        step_for(largest, num_parties)


def test_rounding_is_right_on_average() -> None:
    values = np.repeat([-1.75, -0.5, 0.0, 0.25, 3.0], 40_000)
    rounded = value_of(quantise(values, 1.0, secret_stream(*STREAM)), 1.0)
    assert np.abs(rounded - values).max() < 1
    errors = (rounded - values).reshape(5, -1)
    assert np.abs(errors.mean(axis=1)).max() < 4 * 0.5 / np.sqrt(40_000)  # a coin's deviation is 0.5 at most
    assert not errors[[2, 4]].any()  # whole numbers stay


def test_each_value_may_have_its_own_step() -> None:
    steps = np.array([0.5, 2.0, 1e-3])
    words = quantise(np.array([1.5, -4.0, 0.007]), steps, secret_stream(*STREAM))
    assert np.allclose(value_of(words, steps), [1.5, -4.0, 0.007], atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(SecureError, match="not finite"):
        quantise(np.array([0.0, value]), 1.0, secret_stream(*STREAM))
