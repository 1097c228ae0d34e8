from typing import Any

import pytest

from fedllm.data.fields import (
    Example,
    Fields,
    RowProblem,
    Turn,
    detect_fields,
    mapped_columns,
    name_columns,
    to_example,
)
from fedllm.errors import ConfigError, DataError
from tests.data.builders import SECRET


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["id", "messages", "prompt", "response"], Fields(conversation="messages")),
        (["Conversations"], Fields(conversation="Conversations")),
        (
            ["Instruction", "INPUT", "Output"],
            Fields(prompt="Instruction", subject="INPUT", response="Output"),
        ),
        (["instruction", "output", "answer"], Fields(prompt="instruction", response="output")),
        (["prompt", "response", "text"], Fields(prompt="prompt", response="response")),
        (["prompt", "completion"], Fields(prompt="prompt", response="completion")),
        (["question", "answer", "input"], Fields(prompt="question", response="answer")),
        (["instruction", "response"], Fields(prompt="instruction", response="response")),
        (
            ["instruction", "context", "response", "category"],
            Fields(prompt="instruction", subject="context", response="response"),
        ),
        (["label", "Text"], Fields(text="Text")),
    ],
)
def test_usual_names_are_recognised_in_any_case_and_in_order(columns: list[str], expected: Fields) -> None:
    assert detect_fields(columns) == expected


def test_an_explicit_mapping_wins_over_usual_names() -> None:
    columns = ["messages", "prompt", "response", "ask", "tell"]
    pair = mapped_columns("prompt=ask, response=tell")
    assert detect_fields(columns, pair) == Fields(prompt="ask", response="tell")
    assert detect_fields(columns, mapped_columns("text=tell")) == Fields(text="tell")


def test_a_mapped_name_may_hold_commas() -> None:
    assert mapped_columns("response=a,b,prompt=c = d") == {"prompt": "c = d", "response": "a,b"}
    assert mapped_columns("") == {}


@pytest.mark.parametrize(
    ("mapping", "absent"),
    [("prompt=ask,response=b", "ask"), ("prompt=a,response=tell", "tell"), ("text=whole", "whole")],
)
def test_absent_column_is_named_with_those_present(mapping: str, absent: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_fields(["a", "b"], mapped_columns(mapping))
    assert str(caught.value) == f"data.columns: {absent!r} is not among the columns (a, b)"


@pytest.mark.parametrize(
    "mapping",
    [
        *("prompt=a", "response=a", "text=a,prompt=b", "text=a,prompt=b,response=c"),
        *("a", "answer=a", "text=a,text=b", "question=a,prompt=b,response=c"),
    ],
)
def test_a_contradictory_mapping_is_a_config_error(mapping: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.columns = "):
        mapped_columns(mapping)


@pytest.mark.parametrize("columns", [[], ["chosen", "rejected"], ["prompt"], ["answer", "output"]])
def test_unknown_columns_are_listed_with_the_keys_that_map_them(columns: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        detect_fields(columns)
    assert all(part in str(caught.value) for part in (*columns, "data.columns"))


def test_a_header_that_is_really_a_row_of_text_is_not_shown() -> None:
    shown = name_columns(["id", f"Patient {SECRET} has", "x" * 41])
    assert shown == "the columns (id, 2 not shown)"
    assert name_columns(f"c{number}" for number in range(30)).endswith("c19, 10 not shown)")


def pair(prompt: str, response: str) -> Example:
    return Example(turns=(Turn("user", prompt), Turn("assistant", response)))


ALPACA = Fields(prompt="instruction", subject="input", response="output")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "do", "input": "this", "output": "ok"}, "do\n\nthis"),
        ({"instruction": "do", "input": "", "output": "ok"}, "do"),
        ({"instruction": "do", "input": " \n", "output": "ok"}, "do"),
        ({"instruction": "do", "input": None, "output": "ok"}, "do"),
        ({"instruction": "do", "output": "ok"}, "do"),
    ],
)
def test_input_follows_the_instruction_unless_empty(row: dict[str, Any], prompt: str) -> None:
    assert to_example(row, ALPACA) == pair(prompt, "ok")


def test_a_text_is_kept_as_it_is() -> None:
    assert to_example({"text": " a\n"}, Fields(text="text")) == Example(text=" a\n")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"output": SECRET}, "column 'instruction' is missing"),
        ({"instruction": SECRET, "output": None}, "column 'output' is null"),
        ({"instruction": SECRET, "output": 4}, "column 'output' is not text"),
        ({"instruction": SECRET, "output": {"a": SECRET}}, "column 'output' is not text"),
        ({"instruction": SECRET, "output": " \n"}, "column 'output' is empty"),
        ({"instruction": SECRET, "input": [SECRET], "output": "a"}, "column 'input' is not text"),
    ],
)
def test_an_unusable_cell_is_named_by_column_and_never_quoted(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        to_example(row, ALPACA)
    assert str(caught.value) == reason


CHAT = Fields(conversation="messages")


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_messages_and_sharegpt_become_the_same_turns() -> None:
    turns = (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"))
    sharegpt = [
        {"from": name, "value": said} for name, said in (("system", "s"), ("human", "u"), ("gpt", "a"))
    ]
    assert to_example(chat(("system", "s"), ("user", "u"), ("assistant", "a")), CHAT) == Example(turns=turns)
    assert to_example({"conversations": sharegpt}, Fields(conversation="conversations")) == Example(
        turns=turns
    )


def test_a_conversation_ends_with_its_last_answer() -> None:
    row = chat(("user", "u"), ("assistant", "a"), ("user", "more"), ("user", "and more"))
    assert to_example(row, CHAT) == pair("u", "a")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "is missing"),
        ({"messages": SECRET}, "not a list of messages"),
        ({"messages": None}, "not a list of messages"),
        ({"messages": [SECRET]}, "message 1 is not an object"),
        (chat(("user", "u"), (SECRET, "a")), "message 2 has no known role"),
        ({"messages": [{"content": SECRET}]}, "message 1 has no known role"),
        (chat(("user", SECRET), ("assistant", None)), "message 2 is null"),
        (chat(("user", SECRET), ("assistant", "")), "message 2 is empty"),
        (chat(("user", [SECRET]), ("assistant", "a")), "message 1 is not text"),
        (chat(("user", SECRET)), "no assistant's answer"),
        (chat(("assistant", SECRET)), "no assistant's answer"),
        (chat(), "no assistant's answer"),
    ],
)
def test_a_malformed_conversation_is_explained_and_never_quoted(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        to_example(row, CHAT)
    assert reason in str(caught.value)
    assert SECRET not in str(caught.value)
