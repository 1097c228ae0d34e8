"""Turns the rows of a data set into a task: which columns are the question, the choices and the answer.

Forms are recognised by the columns that public data sets use. A row of choices becomes the usual prompt of
lm-evaluation-harness, `Question: ...` and `Answer:` on a line of its own; a row as clients train on keeps its
form.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.data.fields import Example, RowProblem, detect_fields, to_example
from fedllm.errors import DataError, NoDataError
from fedllm.evaluation.numbers import final_number
from fedllm.evaluation.task import Item, Task

MOST_LABELS = 20  # distinct answers up to which rows with a label are a classification
_QUESTIONS = ("question", "question_stem", "goal", "query", "sentence")
_CONTEXTS = ("context", "passage")
_CHOICES = ("choices", "options")
_CHOICE_COLUMNS = (("sol1", "sol2"), ("opa", "opb", "opc", "opd"), ("A", "B", "C", "D"))
_RIGHT = ("answerKey", "answer_idx", "answer", "cop", "label", "target")
_IS_NUMBER = re.compile(r"(?:.*####)?\s*-?\d[\d,]*(?:\.\d+)?\s*", re.DOTALL)


def make_task(name: str, rows: Sequence[Mapping[str, Any]]) -> Task:
    """Return the task that rows of one form make.

    Raises:
        DataError: their columns are of no known form, or a row lacks what the others have.
        NoDataError: there are fewer than two rows, of which nothing can be said.
    """
    rows = [row for row in rows if not _is_empty_text(row)]
    if len(rows) < 2:
        raise NoDataError(f"task {name}: {len(rows)} rows; two are the fewest of which anything can be said")
    if _has_choices(rows[0]):
        return Task(name, "choice", tuple(_each(name, rows, _choice_item)))
    try:
        fields = detect_fields(dict.fromkeys(column for row in rows for column in row))
    except DataError as error:
        what = str(error).partition(";")[0]
        raise DataError(
            f"task {name}: {what}; expected question, choices and answer, or a form that clients train on"
        ) from None
    examples = _each(name, rows, lambda row: to_example(row, fields))
    asked = [example for example in examples if len(example.turns) > 1]
    if len(asked) < len(examples):
        return Task(name, "text", tuple(Item(example) for example in examples))
    answers = [example.turns[-1].content for example in asked]
    prompts = [Example(turns=example.turns[:-1]) for example in asked]
    if all(map(_IS_NUMBER.fullmatch, answers)):
        numbers = map(final_number, answers)
        return Task(name, "number", tuple(Item(p, number=n) for p, n in zip(prompts, numbers, strict=True)))
    labels = sorted(set(answers))
    if all("label" in row for row in rows) and 1 < len(labels) <= MOST_LABELS:
        rights = map(labels.index, answers)
        items = (Item(p, tuple(labels), right) for p, right in zip(prompts, rights, strict=True))
        return Task(name, "choice", tuple(items))
    return Task(name, "text", tuple(Item(example) for example in examples))


def _is_empty_text(row: Mapping[str, Any]) -> bool:
    """Return whether a row is an empty line between paragraphs, as sets of plain text have."""
    return set(row) == {"text"} and not str(row["text"] or "").strip()


def _each(name: str, rows: Sequence[Mapping[str, Any]], make: Any) -> list[Any]:
    """Return what `make` gives for each row; its error says which row it is and quotes nothing of it."""
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append(make(row))
        except RowProblem as problem:
            raise DataError(f"task {name}, row {number}: {problem}; mend the row or leave it out") from None
    return made


def _has_choices(row: Mapping[str, Any]) -> bool:
    if not any(column in row for column in _QUESTIONS):
        return False
    if any(isinstance(row.get(column), list | dict) for column in _CHOICES):
        return True
    given = any(set(columns) <= row.keys() for columns in _CHOICE_COLUMNS)
    return given or isinstance(row.get("answer"), bool) or "final_decision" in row


def _choice_item(row: Mapping[str, Any]) -> Item:
    question = next((row[column] for column in _QUESTIONS if isinstance(row.get(column), str)), "")
    choices, labels = _choices(row)
    if not question.strip() or len(choices) < 2 or not all(choices):
        raise RowProblem("needs a question and two choices at least, none of them empty")
    right = _right(row, choices, labels)
    context = next((text for column in _CONTEXTS if (text := _context(row.get(column)))), "")
    prompt = f"{context}\n" if context else ""
    return Item(Example(text=f"{prompt}Question: {question.strip()}\nAnswer:"), choices, right)


def _choices(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the choices of a row, and the names by which it may call them."""
    letters = tuple(string.ascii_uppercase)
    value = next((row[column] for column in _CHOICES if row.get(column)), None)
    if isinstance(value, Mapping) and "text" in value:  # ARC, OpenBookQA
        return _words(value["text"]), _words(value.get("label") or letters)
    if isinstance(value, Mapping):  # MedQA
        return _words(tuple(value.values())), tuple(map(str, value))
    if value is not None:
        return _words(value), letters
    for columns in _CHOICE_COLUMNS:
        if set(columns) <= row.keys():
            return tuple(str(row[column] or "") for column in columns), letters
    if "final_decision" in row:  # PubMedQA
        return ("yes", "no", "maybe"), ("yes", "no", "maybe")
    if isinstance(row.get("answer"), bool):  # BoolQ
        return ("no", "yes"), ("no", "yes")
    raise RowProblem("has no choices")


def _words(values: Any) -> tuple[str, ...]:
    """Return a list of texts or numbers as texts."""
    is_list = isinstance(values, list | tuple)
    if not is_list or not all(isinstance(each, str | int | float) for each in values):
        raise RowProblem("its choices are no list of texts")
    return tuple(map(str, values))


def _right(row: Mapping[str, Any], choices: Sequence[str], labels: Sequence[str]) -> int:
    """Return the place of the right choice, which a row names by its place, its label or its text."""
    value = next((row[column] for column in (*_RIGHT, "final_decision") if row.get(column) is not None), None)
    if isinstance(value, int) and 0 <= value < len(choices):  # also true and false
        return int(value)
    text = str(value)
    for names in (labels[: len(choices)], choices):
        if text in names:
            return list(names).index(text)
    if text.isdigit() and int(text) < len(choices):
        return int(text)
    raise RowProblem("its answer is none of its choices, neither by place nor by name")


def _context(value: Any) -> str:
    """Return the text that a question is about: a text, a list of them, or PubMedQA's object."""
    if isinstance(value, Mapping):
        value = value.get("contexts")
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value or "").strip()
