"""Likelihoods of choices and texts are those of transformers row by row, and of lm-evaluation-harness."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedllm.data.fields import Example, Turn
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.evaluation.likelihood import (
    choice_rows,
    context_length,
    measure_choices,
    measure_texts,
    score_rows,
    text_rows,
)
from fedllm.evaluation.read_items import make_task
from fedllm.evaluation.task import Item, Task
from tests.evaluation.conftest import adapters_of

TEXTS = ("Return the sum of two numbers.", "Open a file.", "Sort the list in place, and return it again.")


def plain_sum(engine: Engine, prompt: str, continuation: str) -> float:
    """Return the log-likelihood of a continuation by transformers alone, its tokens split as one text."""
    tokenizer = engine.base.tokenizer
    given, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + continuation))
    with torch.no_grad():
        log = engine.base.model(torch.tensor([whole])).logits[0].log_softmax(dim=1)
    return float(sum(log[place - 1, whole[place]] for place in range(len(given), len(whole))))


def all_rows(engine: Engine, task: Task) -> list[list]:
    return [choice_rows(engine.base, item.prompt, item.choices) for item in task.items]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_choices_have_the_likelihoods_of_transformers(kind: str, make_engine: Callable, quiz: Task) -> None:
    engine = make_engine(kind)
    (found,) = score_rows(engine, adapters_of(engine, 1), all_rows(engine, quiz))
    for item, rows in zip(quiz.items, found, strict=True):
        for choice, row in zip(item.choices, rows, strict=True):
            expected = plain_sum(engine, item.prompt.text, f" {choice}")
            assert row.log_likelihood == pytest.approx(expected, abs=1e-9)


def test_choices_equal_those_of_lm_evaluation_harness(make_engine: Callable, quiz: Task) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'fedllm[eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    engine = make_engine()
    harness = HFLM(pretrained=engine.base.model, tokenizer=engine.base.tokenizer, device="cpu")
    asked = [(item.prompt.text, f" {choice}") for item in quiz.items for choice in item.choices]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    expected = [answer for answer, _ in harness.loglikelihood(requests)]
    expected += harness.loglikelihood_rolling(texts)
    groups = all_rows(engine, quiz) + [text_rows(engine.base, Example(text=text)) for text in TEXTS]
    (found,) = score_rows(engine, adapters_of(engine, 1), groups)
    assert [row.log_likelihood for rows in found for row in rows] == pytest.approx(expected, abs=1e-6)


def test_adapters_in_one_pass_give_the_engines_losses(make_engine: Callable, quiz: Task) -> None:
    engine = make_engine()
    adapters, groups = adapters_of(engine, 3), all_rows(engine, quiz)
    for adapter, found in zip(adapters, score_rows(engine, adapters, groups), strict=True):
        rows = [row for group in groups for row in group]
        scores = [score for group in found for score in group]
        for row, score in zip(rows, scores, strict=True):
            (wanted,) = engine.evaluate([EvaluationJob("a", adapter, (row,))])
            assert -score.log_likelihood / score.num_tokens == pytest.approx(wanted.loss, rel=1e-9)


def test_how_questions_share_passes_changes_nothing(make_engine: Callable, quiz: Task) -> None:
    found = []
    for budget in (1, 64, 4096):
        engine = make_engine(budget=budget)
        found.append(score_rows(engine, adapters_of(engine, 2), all_rows(engine, quiz)))
    flat = [[row.log_likelihood for a in each for group in a for row in group] for each in found]
    assert flat[1] == pytest.approx(flat[0], rel=1e-9)
    assert flat[2] == pytest.approx(flat[0], rel=1e-9)


def test_the_likeliest_choice_is_the_answer(make_engine: Callable, quiz: Task) -> None:
    engine = make_engine()
    sums = [
        [plain_sum(engine, item.prompt.text, f" {choice}") for choice in item.choices] for item in quiz.items
    ]
    lengths = [[len(choice) for choice in item.choices] for item in quiz.items]
    means = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(sums, lengths, strict=True)]
    (scores,) = measure_choices(engine, adapters_of(engine, 1), quiz)
    for figure, values in (("accuracy", sums), ("accuracy-normalised", means)):
        right = [row.index(max(row)) == item.right for row, item in zip(values, quiz.items, strict=True)]
        assert scores.figures[figure].tops == [float(flag) for flag in right]


def test_a_users_turn_is_answered_after_the_chat_template(make_engine: Callable) -> None:
    engine = make_engine()
    prompt = Example(turns=(Turn("user", "Good or bad?"),))
    rows = choice_rows(engine.base, prompt, ["good", "bad"])
    learnt = [engine.base.tokenizer.decode(row.learnt_tokens) for row in rows]
    assert learnt == ["good", "bad"]
    assert engine.base.tokenizer.decode(rows[0].tokens) == "<|user|>Good or bad?<|end|><|assistant|>good"


def test_every_token_of_a_long_text_is_predicted_once(make_engine: Callable) -> None:
    base = make_engine("gpt2").base
    most = context_length(base)
    text = " ".join(TEXTS * 40)
    tokens = base.tokenizer(text)["input_ids"]
    assert len(tokens) > 2 * most
    rows = text_rows(base, Example(text=text))
    assert [token for row in rows for token in row.learnt_tokens] == tokens
    assert max(len(row.tokens) for row in rows) == most + 1
    assert min(len(row.tokens) for row in rows) == most + 1  # the last window too has all the context


def test_bits_per_byte_and_hits_are_of_all_tokens(make_engine: Callable) -> None:
    engine = make_engine()
    task = make_task("texts", [{"text": text} for text in TEXTS])
    (scores,) = measure_texts(engine, adapters_of(engine, 1), task)
    tokenizer, nats, first, top, number = engine.base.tokenizer, 0.0, 0, 0, 0
    for text in TEXTS:
        tokens = tokenizer(text)["input_ids"]
        row = torch.tensor([[tokenizer.eos_token_id, *tokens]])
        with torch.no_grad():
            log = engine.base.model(row).logits[0, :-1].log_softmax(dim=1)
        nats -= float(log.gather(1, torch.tensor(tokens)[:, None]).sum())
        best = log.topk(3).indices
        first += int((best[:, 0] == torch.tensor(tokens)).sum())
        top += int((best == torch.tensor(tokens)[:, None]).sum())
        number += len(tokens)
    size = sum(len(text.encode()) for text in TEXTS)
    found = {name: ratio.value for name, ratio in scores.figures.items()}
    assert found["loss"] == pytest.approx(nats / number)
    assert found["bits-per-byte"] == pytest.approx(nats / math.log(2) / size)
    assert (found["top-1"], found["top-3"]) == pytest.approx((first / number, top / number))


def test_the_loss_of_conversations_is_the_held_out_loss(make_engine: Callable) -> None:
    engine = make_engine()
    rows = [{"prompt": text, "response": text[::-1]} for text in TEXTS]
    task = make_task("rows", rows)
    encoded = tuple(row for item in task.items for row in text_rows(engine.base, item.prompt))
    (wanted,) = engine.evaluate([EvaluationJob("a", adapters_of(engine, 1)[0], encoded)])
    (scores,) = measure_texts(engine, adapters_of(engine, 1), task)
    assert scores.figures["loss"].value == pytest.approx(wanted.loss)
    assert "bits-per-byte" not in scores.figures


def test_a_prompt_beyond_the_context_loses_its_beginning(make_engine: Callable) -> None:
    base = make_engine("gpt2").base
    item = Item(Example(text=" ".join(TEXTS * 20)), ("a list", "a file"))
    whole = choice_rows(base, replace(item.prompt, text=TEXTS[0]), item.choices)
    rows = choice_rows(base, item.prompt, item.choices)
    assert [len(row.tokens) for row in rows] == [context_length(base) + 1] * 2
    assert [row.learnt_tokens for row in rows] == [row.learnt_tokens for row in whole]
