from decimal import Decimal
from typing import Any

import pytest

from fedllm.data.fields import (
    BadRow,
    Example,
    Fields,
    RowProblem,
    Turn,
    count_reasons,
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
        ({"instruction": SECRET, "output": float("nan")}, "column 'output' is null"),
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


@pytest.mark.parametrize("value", [3, 4.5, True, Decimal("0.10")])
def test_a_number_as_an_answer_becomes_its_text(value: Any) -> None:
    expected = {3: "3", 4.5: "4.5", True: "true", Decimal("0.10"): "0.10"}[value]
    assert to_example({"instruction": "rate", "output": value}, ALPACA) == pair("rate", expected)
    assert to_example(chat(("user", "rate"), ("assistant", value)), CHAT) == pair("rate", expected)


def message(**values: Any) -> dict[str, Any]:
    """Return a message with every name that some format uses, null where no value is given."""
    return {"role": None, "from": None, "content": None, "value": None, "tool_calls": None, **values}


def test_of_two_names_for_one_thing_the_one_with_a_value_counts() -> None:
    mixed = [
        message(**{"from": "human", "value": "u"}),
        message(role="assistant", content="a"),
        message(role="user", value="more", content=""),
        message(**{"from": "gpt", "content": "b"}),
    ]
    turns = (Turn("user", "u"), Turn("assistant", "a"), Turn("user", "more"), Turn("assistant", "b"))
    assert to_example({"messages": mixed}, CHAT) == Example(turns=turns)


@pytest.mark.parametrize("nothing", [None, "", " \n", []])
def test_an_empty_system_turn_is_dropped_and_the_row_kept(nothing: Any) -> None:
    assert to_example(chat(("system", nothing), ("user", "u"), ("assistant", "a")), CHAT) == pair("u", "a")


def test_a_developer_speaks_as_the_system() -> None:
    (first, *_) = to_example(chat(("developer", "s"), ("user", "u"), ("assistant", "a")), CHAT).turns
    assert first == Turn("system", "s")


@pytest.mark.parametrize("name", ["system", "System_Prompt"])
def test_a_system_column_comes_before_a_conversation_and_a_prompt(name: str) -> None:
    chats, pairs = detect_fields([name, "messages"]), detect_fields([name, "prompt", "response"])
    both = chat(("user", "u"), ("assistant", "a"))
    expected = Example(turns=(Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a")))
    assert to_example({name: "s", **both}, chats) == expected
    assert to_example({name: "s", "prompt": "u", "response": "a"}, pairs) == expected
    for nothing in (None, "", " "):
        assert to_example({name: nothing, **both}, chats) == pair("u", "a")
    own = chat(("system", "mine"), ("user", "u"), ("assistant", "a"))
    assert to_example({name: "s", **own}, chats).turns[0] == Turn("system", "mine")


def test_content_as_parts_of_text_is_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}, {"text": "!"}]
    row = chat(("user", parts), ("assistant", [{"type": "text", "text": "a", "image_url": None}]))
    assert to_example(row, CHAT) == pair("one two!", "a")


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"type": "image"}, "message 1 has a part of kind 'image'"),
        ({"type": "image_url", "image_url": {"url": SECRET}}, "message 1 has a part of kind 'image_url'"),
        ({"type": SECRET, "text": SECRET}, "message 1 has a part without text"),
        ({"type": "text", "text": None}, "message 1 has a part without text"),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_kind(part: dict[str, Any], told: str) -> None:
    with pytest.raises(RowProblem) as caught:
        to_example(chat(("user", [{"type": "text", "text": SECRET}, part]), ("assistant", "a")), CHAT)
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    fields = detect_fields(["prompt", "completion"])
    asked = chat(("system", "s"), ("user", "u"), ("assistant", "first"), ("user", "more"))["messages"]
    told = chat(("assistant", "a"))["messages"]
    turns = (
        *(Turn("system", "s"), Turn("user", "u"), Turn("assistant", "first", learnt=False)),
        *(Turn("user", "more"), Turn("assistant", "a")),
    )
    assert to_example({"prompt": asked, "completion": told}, fields) == Example(turns=turns)
    assert to_example({"prompt": asked, "completion": "a"}, fields) == Example(turns=turns)
    assert to_example({"prompt": "u", "completion": told}, fields) == pair("u", "a")
    whole = chat(("user", "u"), ("assistant", "a"))["messages"]
    assert to_example({"prompt": "u", "completion": whole}, fields) == pair("u", "a")


def test_an_answer_of_weight_0_is_read_and_not_learnt() -> None:
    row = chat(("user", "u"), ("assistant", "bad"), ("user", "again"), ("assistant", "good"))
    row["messages"][1]["weight"] = 0
    assert [turn.learnt for turn in to_example(row, CHAT).turns] == [True, False, True, True]
    row["messages"][3]["weight"] = 0
    with pytest.raises(RowProblem, match="no assistant's answer"):
        to_example(row, CHAT)


def test_an_empty_turn_after_the_last_answer_costs_nothing() -> None:
    assert to_example(chat(("user", "u"), ("assistant", "a"), ("user", "")), CHAT) == pair("u", "a")


@pytest.mark.parametrize("name", ["tool", "function", "function_call", "observation"])
def test_the_role_of_a_tool_is_named(name: str) -> None:
    with pytest.raises(RowProblem, match=f"message 2 has no known role: '{name}' is a tool's"):
        to_example(chat(("user", "u"), (name, SECRET), ("assistant", "a")), CHAT)


@pytest.mark.parametrize("name", ["tool_calls", "function_call"])
def test_a_call_of_a_tool_is_named(name: str) -> None:
    row = chat(("user", "u"), ("assistant", None), ("tool", SECRET), ("assistant", "a"))
    row["messages"][1][name] = [{"function": {"name": SECRET}}]
    with pytest.raises(RowProblem) as caught:
        to_example(row, CHAT)
    assert "message 2 calls a tool" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_preferences_are_refused_with_the_keys_that_read_them() -> None:
    with pytest.raises(DataError, match=r"preferences \(chosen, rejected\).*data\.columns"):
        detect_fields(["prompt", "chosen", "rejected"])
    chosen = chat(("user", "u"), ("assistant", "a"))["messages"]
    fields = detect_fields(["prompt", "chosen"], mapped_columns("prompt=prompt,response=chosen"))
    assert to_example({"prompt": "u", "chosen": chosen}, fields) == pair("u", "a")


def test_reasons_are_counted_one_by_one_with_their_first_line() -> None:
    bad = [BadRow("f.jsonl", line, f"message {line} is empty") for line in (3, 5)]
    told = count_reasons([*bad, BadRow("f.jsonl", 9, "not an object")])
    assert (
        told == "2 x a message is empty (first: f.jsonl, line 3); 1 x not an object (first: f.jsonl, line 9)"
    )
    many = [BadRow("f", line, f"reason {line}") for line in range(9)]
    assert count_reasons(many).endswith("4 for other reasons")
