"""Canaries: fair coins, streams of their own, exposure that grows where a canary was learnt."""

import math
from collections.abc import Callable

import pytest
import torch

from fedllm.attacks.canaries import (
    REPEATS,
    canary_rows,
    draw_canaries,
    plain_vocabulary,
    secret_canaries,
)
from fedllm.attacks.extraction import exposures
from fedllm.attacks.membership import likelihood
from fedllm.attacks.one_run import epsilon_lower_bound, guess_canaries
from fedllm.attacks.token_scores import no_adapter, score, whole
from fedllm.config.keys import AuditConfig
from fedllm.engine.jobs import Job
from fedllm.messages import LocalTraining
from fedllm.models.base import BaseModel

VOCABULARY = range(5, 300)


def test_canaries_are_streams_of_seed_and_client() -> None:
    options = {"number": 40, "length": 12, "seed": 0}
    first = draw_canaries(VOCABULARY, client_id="anna", **options)
    assert first == draw_canaries(VOCABULARY, client_id="anna", **options)
    other = draw_canaries(VOCABULARY, client_id="ben", **options)
    assert not {one.tokens for one in first} & {one.tokens for one in other}
    assert [one.included for one in first] != [one.included for one in other]
    longer = draw_canaries(VOCABULARY, client_id="anna", number=40, length=20, seed=0)
    assert [one.included for one in longer] == [one.included for one in first]  # coins know no tokens
    assert all(token in VOCABULARY for one in first for token in one.tokens)
    assert [one.repeats for one in first[:5]] == [1, 4, 16, 64, 1]


def test_coins_are_fair_and_do_not_know_the_repeats() -> None:
    canaries = draw_canaries(VOCABULARY, client_id="a", number=4000, length=1, seed=1)
    for repeats in REPEATS:
        coins = [one.included for one in canaries if one.repeats == repeats]
        assert abs(sum(coins) - 500) < 4 * (1000 / 4) ** 0.5


def test_included_canaries_become_rows_as_often_as_repeated() -> None:
    canaries = draw_canaries(VOCABULARY, client_id="a", number=12, length=6, seed=0)
    rows = [row.tokens for row in canary_rows(canaries)]
    for one in canaries:
        assert rows.count(one.tokens) == (one.repeats if one.included else 0)


def test_nothing_to_draw_is_refused() -> None:
    for vocabulary, number in (((), 1), (VOCABULARY, 0)):
        with pytest.raises(ValueError, match="canaries need"):
            draw_canaries(vocabulary, client_id="a", number=number, length=3, seed=0)


def test_exposure_by_repeats_ranks_among_those_that_stayed_out() -> None:
    canaries = draw_canaries(VOCABULARY, client_id="a", number=64, length=4, seed=0, repeats=(1, 8))
    losses = [(5.0 if one.repeats == 1 else 1.0) if one.included else 4.0 for one in canaries]
    found = exposures(canaries, losses)
    num_out = sum(not one.included for one in canaries)
    assert list(found) == [1, 8]
    assert set(found[1]) == {0.0}  # behind all others
    assert found[8] == pytest.approx([math.log2(num_out + 1)] * len(found[8]))


def test_only_an_adapter_trained_on_canaries_is_caught(
    make_exact_engine: Callable,
) -> None:
    """The positive control of an audit: without protection it must find much; without training nothing."""
    engine = make_exact_engine(8, "all-linear")
    canaries = draw_canaries(VOCABULARY, client_id="a", number=48, length=10, seed=3, repeats=(1,))
    rows, steps = canary_rows(canaries), 50
    training = LocalTraining(
        steps=steps, batch_size=len(rows), learning_rate=0.02, weight_decay=0.0, clip_norm=1.0
    )
    start = 0.1 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(0))
    (result,) = engine.train([Job("a", start, (rows,) * steps, training)])
    found = score(
        engine,
        [start + result.delta, start, no_adapter(engine)],
        [whole(one.tokens) for one in canaries],
    )
    trained, untrained, base = ([-likelihood(one) for one in scores] for scores in found)
    caught, control = (guess_canaries(canaries, losses, base) for losses in (trained, untrained))
    assert epsilon_lower_bound(caught) > 1
    assert epsilon_lower_bound(control) < 0.5
    high, low = (exposures(canaries, losses)[1] for losses in (trained, untrained))
    assert sum(high) / len(high) > 2 * sum(low) / len(low)


def test_canaries_of_a_run_come_from_its_secret(load_tiny: Callable[..., BaseModel]) -> None:
    tokenizer = load_tiny().tokenizer
    section = AuditConfig(canaries="20:1,4")
    first = secret_canaries(section, tokenizer, client_id="anna", secret=b"x" * 32)
    assert first == secret_canaries(section, tokenizer, client_id="anna", secret=b"x" * 32)
    assert [(len(one.tokens), one.repeats) for one in first[:3]] == [(16, 1), (16, 4), (16, 1)]
    for other in ({"client_id": "ben", "secret": b"x" * 32}, {"client_id": "anna", "secret": b"y" * 32}):
        drawn = secret_canaries(section, tokenizer, **other)
        assert not {one.tokens for one in first} & {one.tokens for one in drawn}
    assert secret_canaries(AuditConfig(), tokenizer, client_id="anna", secret=b"x" * 32) == ()


def test_no_canary_holds_a_special_token(load_tiny: Callable[..., BaseModel]) -> None:
    tokenizer = load_tiny().tokenizer
    plain = plain_vocabulary(tokenizer)
    assert plain == sorted(set(plain))
    assert set(plain).isdisjoint(tokenizer.all_special_ids)
    assert len(plain) > 300
