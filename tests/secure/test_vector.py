"""The vector of a party: what the sum of many says is the weighted mean, and none wraps around."""

import numpy as np
import pytest

from fedllm.errors import SecureError
from fedllm.secure.agreement import Stream
from fedllm.secure.vector import LARGEST_LOSS, Scale, client_values, read_sum, words_of

LARGEST = 0.02


def scale_of(number: int) -> Scale:
    return Scale(num_clients=number, largest=LARGEST, weight_cap=900.0, most_tokens=4096)


@pytest.mark.parametrize("number", [3, 10, 100])
def test_the_sum_says_the_weighted_means(number: int) -> None:
    draw, scale = np.random.default_rng(0), scale_of(number)
    deltas = draw.uniform(-LARGEST, LARGEST, (number, 50))
    weights, losses = draw.uniform(1, 900, number), draw.uniform(0, 9, number)
    tokens = draw.integers(1, 4096, number)
    total = np.zeros(53, np.uint32)
    for place in range(number):
        values = client_values(
            deltas[place],
            weight=weights[place],
            num_tokens=tokens[place],
            loss=losses[place],
            scale=scale,
        )
        total += words_of(values, scale, Stream(place.to_bytes(16)))
    found = read_sum(total, scale)
    # Each word is off by less than a step, and so the sum by less than one a client.
    near = number * scale.step / (weights.sum() / 900)
    np.testing.assert_allclose(found.mean, weights @ deltas / weights.sum(), atol=2 * near)
    assert near < 1e-3 * LARGEST
    assert found.weight == pytest.approx(weights.sum(), rel=1e-4)
    assert found.num_tokens == pytest.approx(tokens.sum(), rel=1e-4)
    assert found.loss == pytest.approx(tokens @ losses / tokens.sum(), rel=1e-3)


def test_the_largest_of_all_parties_do_not_wrap_around() -> None:
    scale = scale_of(100)
    for sign in (-1.0, 1.0):
        values = client_values(np.full(4, 9 * sign), weight=1e9, num_tokens=10**9, loss=1e9, scale=scale)
        words = [words_of(values, scale, Stream(place.to_bytes(16))) for place in range(100)]
        found = read_sum(np.sum(words, axis=0, dtype=np.uint32), scale)
        np.testing.assert_allclose(found.mean, sign * LARGEST, rtol=1e-4)
        assert found.weight == pytest.approx(90_000.0, rel=1e-4)
        assert found.loss == pytest.approx(LARGEST_LOSS, rel=1e-4)


def test_withheld_numbers_are_no_numbers() -> None:
    scale = scale_of(3)
    values = client_values(np.zeros(2), weight=5.0, num_tokens=0, loss=0.0, scale=scale)
    found = read_sum(words_of(values, scale, Stream(bytes(16))), scale)
    assert (found.num_tokens, found.loss) == (0, 0.0)


def test_clients_that_weigh_nothing_have_no_mean() -> None:
    with pytest.raises(SecureError, match="weigh nothing together"):
        read_sum(np.zeros(5, np.uint32), scale_of(3))
