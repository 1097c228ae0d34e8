"""Memorisation: one pass says what decoding says; exposure counts ranks."""

import math
from collections.abc import Callable

import pytest
import torch

from fedllm.attacks.extraction import (
    exposure,
    extractable,
    extraction,
    is_extracted,
    suffix_of,
)
from fedllm.attacks.token_scores import no_adapter, score
from fedllm.engine.layers import attached
from fedllm.models.chat import Encoded
from tests.builders import random_texts


def decoded(engine, adapter: torch.Tensor, tokens: tuple[int, ...], prefix: int) -> tuple[int, ...]:
    """Return the text that greedy decoding makes of the prefix, token by token."""
    engine.bank.load(engine.layout, [adapter], [engine.layout.scale])
    found = list(tokens[:prefix])
    with torch.inference_mode(), attached(engine.base.model, engine.bank), engine.bank.whole_rows((0,)):
        while len(found) < len(tokens):
            found.append(int(engine.base.model(torch.tensor([found])).logits[0, -1].argmax()))
    return tuple(found)


def test_a_memorised_text_is_extracted_and_the_controls_are_not(
    make_engine: Callable, overfitted: Callable
) -> None:
    engine = make_engine()
    texts = random_texts([24] * 8)
    adapter = overfitted(engine, texts[:2], steps=120)
    rows = extractable([Encoded(text, text) for text in texts], 8, 16)
    tuned, base = score(engine, [adapter, no_adapter(engine)], rows)
    suffixes = [suffix_of(one, 8, 16) for one in tuned]
    flags = [is_extracted(one) for one in suffixes]
    assert flags == [decoded(engine, adapter, text, 8) == text for text in texts]
    trained, held_out = extraction(suffixes[:2]), extraction(suffixes[2:])
    assert (trained.rate, held_out.rate) == (1.0, 0.0)
    assert trained.low == pytest.approx(0.025 ** (1 / 2))
    assert extraction([suffix_of(one, 8, 16) for one in base]).extracted == 0


def test_only_suffixes_of_texts_that_are_long_enough_count(make_engine: Callable) -> None:
    long, short = tuple(range(5, 45)), tuple(range(5, 20))
    (row,) = extractable([Encoded(long, long), Encoded(short, short)], 10, 20)
    assert row.tokens == long[:30]
    engine = make_engine()
    ((found,),) = score(engine, [no_adapter(engine)], [row])
    suffix = suffix_of(found, 10, 20)
    assert torch.equal(suffix.log_probs, found.log_probs[9:29])  # of tokens 10 to 29
    assert len(suffix.is_top) == 20


def test_nothing_to_extract_is_no_rate() -> None:
    found = extraction([])
    assert (found.rate, found.low, found.high) == (0.0, 0.0, 1.0)


def test_exposure_is_the_logarithm_of_the_rank() -> None:
    others = [float(number) for number in range(1, 1024)]
    assert exposure(0.5, others) == 10.0  # the smallest of 1,024
    assert exposure(1.0, others) == 9.0  # a tie counts against it
    assert exposure(2000.0, others) == 0.0


def test_exposure_of_a_text_that_nothing_is_known_of() -> None:
    def mean_over_ranks(number: int) -> float:
        others = [float(place) for place in range(1, number)]
        return sum(exposure(place + 0.5, others) for place in range(number)) / number

    assert mean_over_ranks(4) == pytest.approx((2 + 1 + math.log2(4 / 3) + 0) / 4)
    assert mean_over_ranks(6) == pytest.approx(1.0, abs=0.01)
    assert mean_over_ranks(100) == pytest.approx(1.4, abs=0.01)
    assert 1.44 < mean_over_ranks(3000) < math.log2(math.e)
