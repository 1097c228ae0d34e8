"""FlowerTune's rule: the first letter of one greedy token, whatever word it begins."""

from collections.abc import Callable

import pytest
import torch

from fedllm.evaluation.flowertune import first_letter, measure_first_letter
from fedllm.evaluation.read_items import make_task
from fedllm.evaluation.task import Task
from tests.evaluation.conftest import adapters_of


@pytest.mark.parametrize(
    ("text", "place"), [("B", 1), (" Answer", 0), ("\n- c)", 2), ("4", -1), ("", -1), ("한", -1)]
)
def test_a_word_counts_as_its_first_letter(text: str, place: int) -> None:
    assert first_letter(text) == place


def test_a_question_beyond_the_context_is_answered_too(make_engine: Callable) -> None:
    engine = make_engine("gpt2")  # which has no position beyond its context
    row = {"question": "What is it? " * 100, "choices": ["a", "b"], "answer": 1}
    (found,) = measure_first_letter(engine, adapters_of(engine, 1), make_task("long", [row, row]))
    assert len(found.tops) == 2


def test_the_letter_is_the_models_greedy_token(make_engine: Callable, quiz: Task) -> None:
    engine = make_engine()
    tokenizer, right = engine.base.tokenizer, []
    for item in quiz.items:
        question = item.prompt.text.removesuffix("\nAnswer:")
        options = "\n".join(
            f"{letter}. {choice}" for letter, choice in zip("ABCD", item.choices, strict=False)
        )
        text = (
            f"<|im_start|>question\nAnswer the following multiple choice question.\n{question}\n\n"
            f"Options:\n{options}\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n"
        )
        with torch.no_grad():
            logits = engine.base.model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        right.append(
            first_letter(tokenizer.decode([int(logits.argmax())], skip_special_tokens=True)) == item.right
        )
    found = measure_first_letter(engine, adapters_of(engine, 2), quiz)
    assert found[0].tops == [float(flag) for flag in right]
    assert len(found) == 2
