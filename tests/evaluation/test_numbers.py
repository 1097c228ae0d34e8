"""Arithmetic: which number of an answer counts, and that every adapter writes its own answers."""

from collections.abc import Callable

import pytest

from fedllm.adapters.layout import AdapterState
from fedllm.evaluation.numbers import final_number, measure_numbers
from fedllm.evaluation.read_items import make_task
from tests.evaluation.conftest import adapters_of

TASK = make_task(
    "sums",
    [
        {"prompt": f"What is {place} and 1?", "response": f"So it is {place + 1}.\n#### {place + 1}"}
        for place in range(3)
    ],
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("#### 12 of 14 apples", "12"),
        ("she pays $1,200.00", "1200"),
        ("first 3, then -0.50", "-0.5"),
        ("#### none, but 7", "7"),
        ("no number", ""),
    ],
)
def test_the_number_after_the_mark_or_else_the_last(text: str, number: str) -> None:
    assert final_number(text) == number


def test_a_prompt_beyond_the_context_is_answered_too(make_engine: Callable) -> None:
    engine = make_engine("gpt2")  # which has no position beyond its context
    rows = [{"prompt": "What is one and 1? " * 80, "response": "#### 2"}] * 2
    (found,) = measure_numbers(engine, adapters_of(engine, 1), make_task("long", rows), max_new_tokens=6)
    assert len(found.generations) == 2


def test_each_adapter_writes_what_the_engine_generates(make_engine: Callable) -> None:
    engine = make_engine()
    adapters = adapters_of(engine, 2)
    found = measure_numbers(engine, adapters, TASK, max_new_tokens=6)
    prompts = [item.prompt.turns[0].content for item in TASK.items]
    for adapter, scores in zip(adapters, found, strict=True):
        states = [AdapterState(engine.layout, adapter)] * len(prompts)
        assert list(scores.generations) == engine.generate(states, prompts, 6)
        right = [
            final_number(text) == item.number
            for text, item in zip(scores.generations, TASK.items, strict=True)
        ]
        assert scores.figures["exact-match"].tops == [float(flag) for flag in right]
