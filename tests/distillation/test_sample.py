"""Sampling: every token is drawn from the distribution of its own adapter, whoever shares the batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.distillation.sample import NextTokens, Samples, sample_texts
from fedllm.engine.generate import end_tokens
from fedllm.errors import ConfigError, LayoutError, NoDataError, NonFiniteError
from fedllm.models.chat import IGNORED
from fedllm.seeds import derive_seed

PROMPTS = [(7, 9), (11,), (20, 21, 22, 23, 24, 25)]
PRIORS = torch.tensor([1.0, 2.0, 5.0])


def drawn(number: int, engine: object, teacher: object, **choices: object) -> Samples:
    numbers = {"number": number, "max_tokens": 9, "seed": 0, **choices}
    return sample_texts(engine, teacher.adapters, PRIORS, PROMPTS, **numbers)  # type: ignore[attr-defined, arg-type]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "gemma2"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_every_token_is_drawn_by_its_own_adapter_and_number(
    kind: str, temperature: float, make_engine: Callable, make_teacher: Callable
) -> None:
    # transformers' own eager attention, which gemma2 needs, gives no numbers beside padding in float64.
    engine = make_engine(kind, "float32" if kind == "gemma2" else "float64")
    teacher = make_teacher(engine)
    samples = drawn(10, engine, teacher, temperature=temperature)
    for number, row in enumerate(samples.rows):
        generator = np.random.Generator(np.random.PCG64(derive_seed(0, "text", number)))
        assert samples.writers[number] == generator.choice(3, p=[1 / 8, 2 / 8, 5 / 8])
        assert samples.prompts[number] == generator.integers(3)
        prompt = PROMPTS[samples.prompts[number]]
        assert row.tokens[: len(prompt)] == prompt
        assert row.labels == (IGNORED,) * len(prompt) + row.tokens[len(prompt) :]
        states = engine.read(engine.layout, [teacher.adapters[samples.writers[number]]], [row])[0]
        probs = (engine.passes.head.logits(states) / temperature).softmax(dim=1)
        for token, probabilities in zip(row.tokens[len(prompt) :], probs, strict=True):
            u, sums = generator.random(), probabilities.double().cumsum(dim=0)
            assert float(sums[token]) > u - 1e-5
            assert token == 0 or float(sums[token - 1]) < u + 1e-5


def test_a_text_depends_on_its_number_alone(make_engine: Callable, make_teacher: Callable) -> None:
    engine = make_engine()
    teacher = make_teacher(engine)
    samples = drawn(12, engine, teacher)
    for at_once in (1, 5):
        assert drawn(12, engine, teacher, at_once=at_once) == samples
    fewer = drawn(5, engine, teacher)
    assert fewer.rows == samples.rows[:5]
    assert drawn(12, engine, teacher, seed=1).rows != samples.rows


def test_first_tokens_have_the_frequencies_of_the_mixture(
    make_engine: Callable, make_teacher: Callable
) -> None:
    """Pearson's statistic against sum_k prior_k p_k, at the 99.9th percentile of chi squared."""
    engine = make_engine("llama", "float32")
    teacher = make_teacher(engine)
    number = 2000
    samples = sample_texts(
        engine, teacher.adapters, PRIORS, [(7, 9)], number=number, max_tokens=1, seed=3, at_once=500
    )
    row = samples.rows[0]
    states = engine.read(engine.layout, teacher.adapters, [row])[:, 0]
    probs = (
        engine.passes.head.logits(states).double().softmax(dim=1) * (PRIORS / PRIORS.sum())[:, None]
    ).sum(dim=0)
    found = torch.bincount(
        torch.tensor([row.tokens[2] for row in samples.rows]), minlength=len(probs)
    ).double()
    common = probs * number >= 5
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * number
    counted = torch.cat([found[common], found[~common].sum()[None]])
    statistic = float(((counted - expected).square() / expected).sum())
    freedom = len(expected) - 1
    assert freedom > 10
    assert statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 5


def test_a_choice_needs_no_look_at_the_device() -> None:
    """On the device "meta" no tensor has values, so whatever asks for one raises."""
    device = torch.device("meta")
    choose = NextTokens([np.random.default_rng(n) for n in range(3)], 4, 0.7, device)
    step_1, logits_BV = torch.ones(1, dtype=torch.int64, device=device), torch.empty(2, 50, device=device)
    assert choose(range(1, 3), step_1, logits_BV).shape == (2,)


def test_a_text_ends_with_its_first_end_token(make_engine: Callable, make_teacher: Callable) -> None:
    engine = make_engine("llama", "float32")
    samples = drawn(60, engine, make_teacher(engine), max_tokens=40, seed=2)
    ends = end_tokens(engine.base)
    ended = 0
    for row, place in zip(samples.rows, samples.prompts, strict=True):
        written = row.tokens[len(PROMPTS[place]) :]
        assert not ends & set(written[:-1])
        assert written[-1] in ends or len(written) == 40
        ended += written[-1] in ends
    assert ended > 0


def test_an_adapter_that_is_not_finite_writes_nothing(make_engine: Callable, make_teacher: Callable) -> None:
    engine = make_engine("llama", "float32")
    first, _, last = make_teacher(engine).adapters
    bad = torch.full_like(first, float("nan"))
    samples = sample_texts(engine, [first, bad, last], PRIORS, PROMPTS, number=40, max_tokens=2, seed=0)
    assert set(samples.writers) == {0, 2}
    with pytest.raises(NonFiniteError):
        sample_texts(engine, [bad], torch.ones(1), PROMPTS, number=1, max_tokens=2, seed=0)


def test_an_adapter_that_overflows_has_its_texts_left_out(
    make_engine: Callable, make_teacher: Callable
) -> None:
    engine = make_engine("llama", "float32")
    teacher = make_teacher(engine)
    first, _, last = teacher.adapters
    wild = torch.full_like(first, 1e30)  # finite, its products are not
    whole = drawn(40, engine, teacher)
    found = sample_texts(engine, [first, wild, last], PRIORS, PROMPTS, number=40, max_tokens=9, seed=0)
    kept = [n for n, writer in enumerate(whole.writers) if writer != 1]
    assert 0 < len(kept) < 40
    assert found.rows == tuple(whole.rows[n] for n in kept)
    assert found.writers == tuple(whole.writers[n] for n in kept)
    assert found.prompts == tuple(whole.prompts[n] for n in kept)
    with pytest.raises(NonFiniteError):
        sample_texts(engine, [wild], torch.ones(1), PROMPTS, number=3, max_tokens=9, seed=0)


def test_what_cannot_be_sampled_is_refused(make_engine: Callable, make_teacher: Callable) -> None:
    engine = make_engine("llama", "float32")
    teacher = make_teacher(engine)
    refused: list[dict[str, Any]] = [{"number": 0}, {"max_tokens": 0}, {"temperature": 0.0}]
    for choices in refused:
        with pytest.raises(ConfigError):
            drawn(choices.pop("number", 1), engine, teacher, **choices)
    with pytest.raises(LayoutError):
        sample_texts(engine, teacher.adapters, torch.ones(2), PROMPTS, number=1, max_tokens=1, seed=0)
    for prompts in ([], [()]):
        with pytest.raises(NoDataError):
            sample_texts(engine, teacher.adapters, PRIORS, prompts, number=1, max_tokens=1, seed=0)
