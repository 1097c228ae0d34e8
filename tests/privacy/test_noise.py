"""The laws that noise, coins and secrets obey."""

import math
import stat
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm.errors import CheckpointError
from fedllm.privacy.keys import bits_digest, derived_key, kept_secret, keyed_hash, new_secret
from fedllm.privacy.noise import SecretStream, coins, discrete_gaussian, gaussian

KEY = bytes(range(32))
# two-sided 99.9 % of a standard normal
Z = 3.29


def test_the_stream_is_chacha20() -> None:
    """First block of RFC 8439's keystream of the zero key and nonce (appendix A.1, test vector 1)."""
    block = SecretStream(bytes(32)).integers(8).tobytes()
    assert block[:16].hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_gaussian_noise_has_the_moments_of_its_law() -> None:
    number, deviation = 400_001, 2.5
    noise = gaussian(SecretStream(KEY), number, deviation) / deviation
    assert noise.dtype == torch.float64
    assert abs(float(noise.mean())) < Z / math.sqrt(number)
    assert abs(float(noise.square().mean()) - 1) < Z * math.sqrt(2 / number)
    assert abs(float((noise**4).mean()) - 3) < Z * math.sqrt(96 / number)
    for lag in (1, 2, 3):  # pairs come from one radius
        assert abs(float((noise[lag:] * noise[:-lag]).mean())) < Z / math.sqrt(number - lag)
        squares = (noise.square() - 1) / math.sqrt(2)
        assert abs(float((squares[lag:] * squares[:-lag]).mean())) < Z / math.sqrt(number - lag)


def test_gaussian_noise_has_the_distribution_function_of_its_law() -> None:
    number = 200_000
    noise = torch.sort(gaussian(SecretStream(KEY), number, 1.0)).values
    law = torch.special.ndtr(noise)
    steps = torch.arange(1, number + 1) / number
    largest = float((law - steps).abs().max())
    assert largest < 1.95 / math.sqrt(number)  # Kolmogorov-Smirnov at 99.9 %


def test_equal_keys_give_equal_noise_and_others_unrelated_noise() -> None:
    first, again = (gaussian(SecretStream(KEY), 1000, 1.0) for _ in range(2))
    other = gaussian(SecretStream(derived_key(KEY, "sum", 1)), 1000, 1.0)
    assert torch.equal(first, again)
    assert abs(float((first * other).mean())) < Z / math.sqrt(1000)
    assert not gaussian(SecretStream(KEY), 0, 1.0).numel()


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.5, 1.0])
def test_coins_fall_at_their_rate(rate: float) -> None:
    number = 50_000
    found = sum(coins(SecretStream(KEY), number, rate))
    assert abs(found - rate * number) <= Z * math.sqrt(number * rate * (1 - rate))


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(4), Fraction(81, 2)])
def test_the_discrete_gaussian_has_its_law(variance: Fraction) -> None:
    number = 20_000
    found = np.array(discrete_gaussian(SecretStream(KEY), number, variance))
    values = np.arange(-60, 61)
    weights = np.exp(-(values**2) / (2 * float(variance)))
    law = weights / weights.sum()
    for value in (-2, -1, 0, 1, 2, 5):
        expected = law[values == value][0]
        share = float((found == value).mean())
        assert abs(share - expected) <= Z * math.sqrt(expected * (1 - expected) / number) + 1e-9
    assert abs(found.mean()) < Z * math.sqrt(float(variance) / number)


def test_a_number_below_a_bound_is_uniform() -> None:
    stream = SecretStream(KEY)
    counts = np.bincount([stream.below(5) for _ in range(20_000)], minlength=5)
    assert len(counts) == 5
    assert ((counts - 4000) ** 2 / 4000).sum() < 18.47  # chi-square with 4 degrees of freedom at 99.9 %
    assert {stream.below(1) for _ in range(10)} == {0}


def test_a_secret_is_drawn_once_and_read_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "private" / "noise-secret"
    secret = kept_secret(path)
    assert kept_secret(path) == secret == path.read_bytes()
    assert len(secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert new_secret() != new_secret()
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is no secret"):
        kept_secret(path)


def test_keys_differ_in_every_name_and_in_where_names_end() -> None:
    keys = {
        derived_key(KEY, "a", 1),
        derived_key(KEY, "a", "1"),
        derived_key(KEY, "a1"),
        derived_key(KEY, "a", 2),
        derived_key(bytes(32), "a", 1),
    }
    assert len(keys) == 5


def test_a_digest_is_of_the_bits() -> None:
    zero = torch.zeros(3)
    assert bits_digest(zero) == bits_digest(torch.zeros(3))
    assert bits_digest(zero) != bits_digest(-zero)
    assert bits_digest(zero) != bits_digest(zero.double())


@pytest.mark.parametrize("size", [0, 1, 33_000])
def test_a_keyed_hash_is_two_sums_of_products(size: int) -> None:
    vector = torch.linspace(-1, 1, size)
    keys = SecretStream(KEY).integers(size + 1)
    bits = vector.numpy().view(np.uint32)
    sums = [sum(int(key) * int(word) for key, word in zip(keys[s:], bits, strict=False)) for s in (0, 1)]
    assert keyed_hash(KEY, vector) == b"".join((total % 2**64).to_bytes(8, "little") for total in sums)


def test_vectors_that_differ_in_one_bit_have_other_hashes() -> None:
    """The highest bit of a word, that of the sign, leaves each sum the fewest bits to differ in: 33."""
    vector = torch.linspace(-1, 1, 1000)
    hashes = {keyed_hash(KEY, vector), keyed_hash(bytes(32), vector)}
    for place in range(0, 1000, 10):
        other = vector.clone()
        other[place] *= -1
        hashes.add(keyed_hash(KEY, other))
    assert len(hashes) == 102
