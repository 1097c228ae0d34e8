"""Rows of public data sets as tasks: choices, labels, numbers, texts; and what is refused, in one line."""

from typing import Any

import pytest

from fedllm.errors import DataError, NoDataError
from fedllm.evaluation.read_items import make_task
from fedllm.evaluation.task import Task

GOOD = {"question": "Why?", "choices": ["a", "b"], "answer": 1}
ASKED = "Question: Why?\nAnswer:"


def two(row: dict[str, Any]) -> Task:
    return make_task("t", [row, row])


@pytest.mark.parametrize(
    ("row", "prompt", "choices", "right"),
    [
        ({"question": "Why?", "choices": ["a b", "c"], "answer": 1}, ASKED, ("a b", "c"), 1),
        ({"question": "Why?", "choices": ["0", "1", "4"], "answer": "B"}, ASKED, ("0", "1", "4"), 1),
        (
            {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            *(ASKED, ("x", "y"), 1),
        ),
        (
            {"question_stem": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
            *(ASKED, ("x", "y"), 1),
        ),
        ({"goal": "Why?", "sol1": "x", "sol2": "y", "label": 1}, ASKED, ("x", "y"), 1),
        (
            {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer": "y", "answer_idx": "B"},
            *(ASKED, ("x", "y"), 1),
        ),
        (
            {"question": "Why?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2},
            *(ASKED, ("w", "x", "y", "z"), 2),
        ),
        ({"question": "Why?", "passage": "So.", "answer": True}, f"So.\n{ASKED}", ("no", "yes"), 1),
        (
            {"question": "Why?", "context": {"contexts": ["So.", "And."]}, "final_decision": "maybe"},
            *(f"So.\nAnd.\n{ASKED}", ("yes", "no", "maybe"), 2),
        ),
    ],
    ids=["ours", "letter", "arc", "openbookqa", "piqa", "medqa", "medmcqa", "boolq", "pubmedqa"],
)
def test_choices_of_public_sets(
    row: dict[str, Any], prompt: str, choices: tuple[str, ...], right: int
) -> None:
    task = two(row)
    assert task.kind == "choice"
    item = task.items[0]
    assert (item.prompt.text, item.choices, item.right) == (prompt, choices, right)


def test_rows_with_few_labels_are_a_classification() -> None:
    rows = [
        {"instruction": "Good or bad?", "input": text, "output": label, "label": label}
        for text, label in (("Up.", "good"), ("Down.", "bad"), ("Up again.", "good"))
    ]
    task = make_task("t", rows)
    assert (task.kind, [item.choices for item in task.items]) == ("choice", [("bad", "good")] * 3)
    assert [item.right for item in task.items] == [1, 0, 1]
    assert task.items[0].prompt.turns[0].content == "Good or bad?\n\nUp."
    assert task.chance == pytest.approx(0.5)
    assert task.best_constant == pytest.approx(2 / 3)


def test_answers_that_end_in_a_number_are_matched_exactly() -> None:
    task = two({"question": "1 + 1?", "answer": "It is 2.\n#### 2"})
    assert (task.kind, task.items[0].number, task.chance, task.best_constant) == ("number", "2", None, 1.0)


@pytest.mark.parametrize(
    "row", [{"text": "Once."}, {"prompt": "Why?", "response": "So."}, {"text": "Nice.", "label": 1}]
)
def test_other_training_rows_are_texts(row: dict[str, Any]) -> None:
    assert two(row).kind == "text"


def test_empty_lines_of_a_text_are_left_out() -> None:
    assert len(make_task("t", [{"text": "One."}, {"text": " "}, {"text": "Two."}]).items) == 2


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([{"text": "One."}], NoDataError, "1 rows"),
        ([{"secret": "x"}] * 2, DataError, "expected question, choices and answer"),
        ([{"question": "Why?", "choices": ["a", "b"], "answer": "secret"}] * 2, DataError, "row 1"),
        ([{"question": "Why?", "choices": ["a", ""], "answer": 0}] * 2, DataError, "none of them empty"),
        ([GOOD, {"question": "Why?"}], DataError, "row 2: has no choices"),
        ([GOOD, {"question": "Why?", "answer": 1}], DataError, "row 2: has no choices"),
        ([GOOD, {**GOOD, "choices": {"text": None}}], DataError, "row 2: its choices are no list of texts"),
        ([GOOD, {**GOOD, "choices": [{"text": "a"}, "b"]}], DataError, "no list of texts"),
    ],
)
def test_rows_of_no_use_are_named_and_not_quoted(
    rows: list[dict[str, Any]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        make_task("t", rows)
    assert "secret" not in str(raised.value).replace("columns (secret)", "")
