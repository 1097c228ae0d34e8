"""Membership: signals are their formulas, separation is counted by hand, an overfitted client stands out."""

import itertools
import math
import zlib
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.attacks.binomial import clopper_pearson
from fedllm.attacks.membership import (
    SIGNALS,
    leads,
    likelihood,
    loss_ratio,
    min_k,
    min_k_plus_plus,
    outliers,
    roc,
    separation,
    zlib_likelihood,
)
from fedllm.attacks.token_scores import TokenScores, no_adapter, score, whole
from tests.builders import random_texts


def scores(log_probs: Sequence[float], mean: float = -2.0, deviation: float = 0.5) -> TokenScores:
    values = torch.tensor(log_probs).double()
    return TokenScores(
        values,
        torch.full_like(values, mean),
        torch.full_like(values, deviation),
        torch.zeros(len(values)) > 0,
    )


def test_signals_are_their_formulas() -> None:
    one, base = scores([-1.0, -2.0, -3.0, -4.0, -5.0]), scores([-4.0] * 5)
    assert likelihood(one) == -3
    assert loss_ratio(one, base) == -3 / 4
    assert zlib_likelihood(one, "abc") == -15 / (8 * len(zlib.compress(b"abc")))
    assert min_k(one, 0.4) == -4.5
    assert min_k(one, 0.01) == -5  # one token at least
    assert min_k_plus_plus(one, 0.4) == (-4.5 + 2) / 0.5


def test_min_k_plus_plus_of_the_models_own_tokens_averages_zero() -> None:
    law = torch.distributions.Categorical(logits=torch.randn(50, generator=torch.Generator().manual_seed(0)))
    log = law.logits.double()
    mean = float((log.exp() * log).sum())
    deviation = math.sqrt(float((log.exp() * (log - mean) ** 2).sum()))
    torch.manual_seed(0)
    drawn = scores(log[law.sample((20_000,))].tolist(), mean, deviation)
    assert abs(min_k_plus_plus(drawn, 1.0)) < 4 / math.sqrt(20_000)


def test_separation_is_counted_by_hand() -> None:
    found = separation([3.0, 2.0, 0.5], [0.0, 1.0, 2.0, 2.0], false_alarms=0.25)
    assert found.area == pytest.approx((4 + (2 + 1) + 1) / 12)  # ties count half
    assert found.caught == 1 / 3  # only 3.0 is above 2.0, which a quarter of the others may pass
    assert (found.low, found.high) == clopper_pearson(1, 3)


@pytest.mark.parametrize(("shift", "area", "caught"), [(1000.0, 1.0, 1.0), (-1000.0, 0.0, 0.0)])
def test_perfect_and_reversed_signals(shift: float, area: float, caught: float) -> None:
    others = [float(number) for number in range(200)]
    found = separation([value + shift for value in others], others)
    assert (found.area, found.caught) == (area, caught)


def test_no_signal_is_chance() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1)).tolist()
    found = separation(values[:2000], values[2000:])
    assert abs(found.area - 0.5) < 0.03
    assert found.caught < 0.03


def test_only_the_allowed_share_of_others_passes_the_threshold() -> None:
    others = [float(number) for number in range(150)]
    assert separation([148.5], others, false_alarms=0.01).caught == 1  # one other of 150 is above
    assert separation([147.5], others, false_alarms=0.01).caught == 0  # two would be


def test_a_separation_of_nothing_or_of_no_number_is_refused() -> None:
    for members, others in (([], [1.0]), ([1.0], []), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match="at least one member"):
            separation(members, others)


def test_a_lead_is_a_clients_over_the_best_of_all_others() -> None:
    assert leads([[-1.0, -3.0, -5.0], [-2.0, -2.5, -5.0]], [-4.0, -4.0, -2.0]) == pytest.approx(
        (1.0, 0.5, 0.0)
    )


def test_only_a_lead_far_beyond_the_sets_is_an_outlier() -> None:
    usual = [0.5, 0.6, 0.55, 0.45, 0.5, 0.62, 0.58]
    assert outliers([*usual, 3.0]) == (False,) * 7 + (True,)
    assert outliers([0.0] * 7 + [0.05]) == (False,) * 8  # stands out, but by next to nothing
    assert not any(outliers([0.5] * 8))


def test_an_overfitted_adapter_tells_its_texts_from_fresh_ones(
    make_engine: Callable, overfitted: Callable
) -> None:
    engine = make_engine()
    texts = random_texts([24] * 24)
    adapter = overfitted(engine, texts[:8])
    tuned, base = score(engine, [adapter, no_adapter(engine)], [whole(text) for text in texts])
    for name, signal in SIGNALS.items():
        values = [signal(one, other, str(text)) for one, other, text in zip(tuned, base, texts, strict=True)]
        assert separation(values[:8], values[8:]).area > 0.95, name
        control = [signal(one, one, str(text)) for one, text in zip(base, texts, strict=True)]
        assert 0.1 < separation(control[:8], control[8:]).area < 0.9, name


def test_a_text_that_one_client_alone_knows_stands_out(make_engine: Callable, overfitted: Callable) -> None:
    engine = make_engine()
    texts = random_texts([24] * 12)
    adapters = [overfitted(engine, texts[:1]), no_adapter(engine), no_adapter(engine)]
    *clients, base = score(engine, adapters, [whole(text) for text in texts])
    means = [[likelihood(one) for one in found] for found in clients]
    flags = outliers(leads(means, [likelihood(one) for one in base]))
    assert flags[0]
    assert not any(flags[1:])


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=20), st.lists(st.integers(0, 6), min_size=1, max_size=20)
)
def test_the_roc_curve_encloses_the_area(members: list[int], others: list[int]) -> None:
    points = roc(members, others)
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (1.0, 1.0)
    assert points == sorted(points)
    enclosed = sum((x - a) * (y + b) / 2 for (a, b), (x, y) in itertools.pairwise(points))
    assert enclosed == pytest.approx(separation(members, others).area)


@pytest.mark.parametrize("unknown", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_makes_only_its_text_stand_out(unknown: float) -> None:
    base = [-3.0] * 9
    adapters = [[-2.9, -2.8, -2.95, -2.85, -2.9, -2.8, -2.95, -0.1, -2.9], [-3.1] * 9]
    expected = outliers(leads([row[1:] for row in adapters], base[1:]))
    assert sum(expected) == 1
    for row in (*adapters, base):
        before, row[0] = row[0], unknown
        assert outliers(leads(adapters, base)) == (True, *expected)
        row[0] = before
    assert outliers(leads([[unknown] * 9, *adapters[1:]], base)) == (True,) * 9
