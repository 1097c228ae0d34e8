"""Answers to public prompts."""

import copy
from collections.abc import Callable
from dataclasses import replace

from fedllm.engine.generate import answers

PROMPTS = ["Sum two numbers.", "Open a file and read all of its lines, then close it."]


def test_tokenizer_without_padding_token_answers_alike(
    load_tiny: Callable,
) -> None:
    base = load_tiny("llama", "float64")
    expected = answers(base, PROMPTS, 6)
    assert len(expected) == 2
    bare = replace(base, tokenizer=copy.deepcopy(base.tokenizer))
    bare.tokenizer.pad_token = None  # as in GPT-2 and Llama
    assert bare.tokenizer.pad_token_id is None
    assert answers(bare, PROMPTS, 6) == expected
    assert [answers(bare, [prompt], 6) for prompt in PROMPTS] == [[answer] for answer in expected]
