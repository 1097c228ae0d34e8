"""Shares of noise: the sum of the fewest answers protects as planned, whatever rounding and the ring do."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import ConfigError
from fedllm.privacy.accounting import Charge, epsilon_of, gaussian_delta
from fedllm.privacy.distributed import SharedNoise, noised_words, rounded, shared_noise
from fedllm.privacy.noise import SecretStream

KEY = bytes(range(32))
BITS, ADAPTER = 24, 2_442_240


def two_thirds(num_parties: int) -> int:
    return -(-2 * num_parties // 3)


def planned(z: float = 1.0, parties: int = 10, values: int = 400, clip: float = 0.5) -> SharedNoise:
    threshold = two_thirds(parties)
    return shared_noise(z, clip, num_values=values, num_parties=parties, threshold=threshold, bits=BITS)


@settings(max_examples=60, deadline=None)
@given(z=st.floats(0.05, 30), parties=st.integers(1, 100), values=st.integers(1, 5_000_000))
def test_the_fewest_answers_have_the_planned_noise(z: float, parties: int, values: int) -> None:
    noise = planned(z, parties, values)
    bound, steps = noise.squared_bound, noise.clip / noise.step
    assert z <= noise.multiplier
    # The parts that make up for the grid, one by one: longer updates, and the gap to continuous noise.
    assert noise.threshold * noise.variance >= z**2 * bound + 2
    assert steps**2 <= bound <= (steps + math.sqrt(values)) ** 2
    # It is no more than those need.
    assert noise.threshold * (noise.variance - 1) <= z**2 * bound * (1 + 1e-8) + 4


@settings(max_examples=60, deadline=None)
@given(z=st.floats(0.05, 30), parties=st.integers(1, 100), values=st.integers(1, 5_000_000))
def test_no_sum_wraps_but_by_a_rare_chance(z: float, parties: int, values: int) -> None:
    noise = planned(z, parties, values)
    left = 2 ** (BITS - 1) - 1 - parties * math.sqrt(noise.squared_bound)
    # A sum of discrete Gaussians is sub-Gaussian: Canonne, Kamath & Steinke 2020, lemma on moments.
    log_chance = math.log(2 * values) - left**2 / (2 * parties * noise.variance)
    assert left > 0
    assert log_chance <= -40 * math.log(2) * (1 - 1e-9)


def test_the_grid_costs_little_at_the_size_of_an_adapter() -> None:
    for parties in (10, 30, 100):
        noise = planned(1.0, parties, ADAPTER)
        assert math.sqrt(noise.squared_bound) * noise.step / noise.clip < 1.003
        # All answering have more noise than the fewest, by 1.20 to 1.23.
        assert 1.19 < math.sqrt(parties / noise.threshold) <= 1.2248


def test_epsilon_is_that_of_a_server_that_adds_the_noise() -> None:
    """Golden figure: 20 releases at multiplier 4 cost 3.6051 at delta 1e-3 (Balle & Wang 2018)."""
    noise = planned(4.0, 30, ADAPTER)
    spent = epsilon_of([Charge(noise.multiplier, 1.0, 20)], 1e-3)
    assert spent == pytest.approx(3.6051, abs=2e-4)
    assert spent <= epsilon_of([Charge(4.0, 1.0, 20)], 1e-3)


@pytest.mark.parametrize(("z", "parties"), [(1e-7, 10), (1e5, 10), (1.0, 100_000)])
def test_a_ring_without_room_is_refused(z: float, parties: int) -> None:
    with pytest.raises(ConfigError, match="has no room"):
        planned(z, parties, ADAPTER)


def chances(variance: float, reach: int) -> np.ndarray:
    places = np.arange(-reach, reach + 1)
    weights = np.exp(-(places**2) / (2 * variance))
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("variance", [0.36, 0.64, 1.0])
def test_a_sum_of_shares_is_as_near_a_discrete_gaussian_as_said(variance: float) -> None:
    parties, reach = 4, 30
    total, one = np.array([1.0]), chances(variance, reach)
    for _ in range(parties):
        total = np.convolve(total, one)
    middle = slice(parties * reach - 8, parties * reach + 9)
    ratio = np.log(total[middle] / chances(parties * variance, parties * reach)[middle])
    said = 5 * sum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, parties))
    assert 0 < np.abs(ratio).max() <= said


@pytest.mark.parametrize("deviation", [0.6, 0.8])
def test_rounded_continuous_noise_is_as_near_as_said(deviation: float) -> None:
    """A continuous Gaussian, rounded by a discrete one about it, against the discrete Gaussian of both."""
    continuous, places = 4.0, np.arange(-40, 41)
    points = np.linspace(-40, 40, 40_001)
    density = np.exp(-(points**2) / (2 * continuous))
    kernel = np.exp(-((places[:, None] - points) ** 2) / (2 * deviation**2))
    total = (kernel / kernel.sum(axis=0)) @ density
    total /= total.sum()
    ratio = np.log(total[30:51] / chances(continuous + deviation**2, 40)[30:51])
    assert 0 < np.abs(ratio).max() <= 5 * math.exp(-2 * math.pi**2 * deviation**2)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_a_release_of_one_value_costs_no_more_than_accounted(epsilon: float) -> None:
    """The exact delta of the sum of shares, computed, against that of the Gaussian that is charged."""
    noise = planned(0.7, 6, 1)
    reach, shift = 400, math.isqrt(noise.squared_bound)
    total, one = np.array([1.0]), chances(noise.variance, reach)
    for _ in range(noise.threshold):
        total = np.convolve(total, one)
    with_update = np.concatenate([np.zeros(shift), total])
    without = np.concatenate([total, np.zeros(shift)])
    spent = float(np.maximum(0, with_update - math.exp(epsilon) * without).sum())
    accounted = gaussian_delta(1 / noise.multiplier, epsilon)
    assert 0.5 * accounted < spent <= accounted + 1e-12


def test_the_sum_of_shares_has_at_least_the_planned_variance() -> None:
    """Zero updates: what is left is noise, per value z C over all that answered, and exact whole numbers."""
    noise = planned(2.0, 6, 4000, clip=0.25)
    zeros = np.zeros(4000)
    words = [noised_words(zeros, noise, bytes([party]) * 32) for party in range(noise.threshold)]
    total = np.sum([word.astype(np.int32).astype(np.int64) for word in words], axis=0) * noise.step
    measured, wanted = (total**2).mean(), (2.0 * 0.25) ** 2
    assert abs(total.mean()) < 3.29 * math.sqrt(wanted / 4000)
    assert measured > wanted * (1 - 3.29 * math.sqrt(2 / 4000))
    one = (words[0].astype(np.int32).astype(np.float64) * noise.step) ** 2
    assert one.mean() == pytest.approx(wanted / noise.threshold, rel=0.15)  # a share is far less
    assert abs(np.corrcoef(words[0].astype(np.int32), words[1].astype(np.int32))[0, 1]) < 3.29 / 4000**0.5


def test_rounding_keeps_the_bound_and_the_mean() -> None:
    noise = planned(1.0, 3, 300)
    values = np.random.default_rng(1).normal(size=300)
    clipped = values * (noise.clip / np.linalg.norm(values))
    stream = SecretStream(KEY)
    draws = [rounded(values, noise, stream) for _ in range(2000)]
    assert max(int(draw @ draw) for draw in draws) <= noise.squared_bound
    apart = np.mean(draws, axis=0) * noise.step - clipped
    assert np.abs(apart).max() < 4.5 * 0.5 * noise.step / math.sqrt(2000)


def test_rounding_is_done_again_where_the_norm_is_too_long() -> None:
    noise = planned(1.0, 3, 50)
    values = np.full(50, noise.clip / math.sqrt(50))
    steps = noise.clip / noise.step
    tight = SharedNoise(
        **{**vars(noise), "squared_bound": math.floor(steps**2)}
    )  # half of all draws are longer
    stream = SecretStream(KEY)
    assert all(
        int(draw @ draw) <= tight.squared_bound
        for draw in (rounded(values, tight, stream) for _ in range(40))
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_no_update_is_longer_than_its_bound(bad: float) -> None:
    noise = planned()
    values = np.full(400, bad)
    whole = rounded(values, noise, SecretStream(KEY))
    assert int(whole @ whole) <= noise.squared_bound


def test_equal_updates_have_equal_words_and_others_unrelated_noise() -> None:
    noise, values = planned(), np.linspace(-0.01, 0.01, 400)
    words = noised_words(values, noise, KEY)
    assert words.dtype == np.uint32
    assert np.array_equal(words, noised_words(values.copy(), noise, KEY))
    others = [
        noised_words(np.nextafter(values, 1), noise, KEY),
        noised_words(values, noise, bytes(32)),  # another sum of the same updates
        noised_words(values, planned(1.0, 11), KEY),
    ]
    for other in others:
        apart = words.astype(np.int32).astype(float), other.astype(np.int32).astype(float)
        assert abs(np.corrcoef(*apart)[0, 1]) < 3.29 / 20 + 0.05
