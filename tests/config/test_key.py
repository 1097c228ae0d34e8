import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.config.key import Key, Scalar, named_values, number_or, split_number
from fedllm.errors import ConfigError

laws = settings(deadline=None, max_examples=60)


def typed(value: Any, *types: type) -> Scalar:
    """Return a value as a key of these types takes it."""
    bounds: dict[str, Any] = {"low": 0, "high": math.inf, "is_open": False, "is_resumable": False}
    return Key(name="some.key", default="", types=types, meaning="", words={}, **bounds).typed(value)


@laws
@given(st.integers(-(10**400), 10**400))
def test_whole_numbers_are_read_from_their_text(number: int) -> None:
    for types in ((int,), (int, str), (int, float, str)):
        assert typed(number, *types) == typed(f" {number} ", *types) == number
    if abs(number) < 10**300:
        for types in ((float,), (float, str)):
            as_float = typed(number, *types)
            assert as_float == float(number)
            assert type(as_float) is float


@laws
@given(st.floats(allow_nan=False))
def test_numbers_are_read_from_their_text(number: float) -> None:
    for types in ((float,), (float, str), (int, float, str)):
        assert typed(number, *types) == typed(str(number), *types) == number


@laws
@given(st.text())
def test_texts_stay_texts_and_only_numerals_are_numbers(text: str) -> None:
    assert typed(text, str) == text
    for kind in (int, float, bool):
        try:
            value = typed(text, kind)
        except ConfigError:
            assert kind is bool or typed(text, kind, str) == text
            continue
        assert type(value) is kind


@pytest.mark.parametrize(
    ("value", "types", "expected"),
    [
        ("true", (bool,), True),
        ("FALSE", (bool,), False),
        (True, (bool,), True),
        (["q_proj", "v_proj"], (str,), "q_proj,v_proj"),
        ([], (str,), ""),
        ([4, 8], (str,), "4,8"),
        (2026, (str,), "2026"),
        (3, (float,), 3.0),
        ("1e-3", (float,), 0.001),
        ("off", (float, str), "off"),
        ("8", (float, str), 8.0),
        ("5", (int, float, str), 5),
        ("1.0", (int, float, str), 1.0),
    ],
)
def test_what_toml_and_a_command_line_give_is_taken(
    value: Any, types: tuple[type, ...], expected: Any
) -> None:
    found = typed(value, *types)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "types", "expected"),
    [
        (1, (bool,), "true or false"),
        ("yes", (bool,), "true or false"),
        ("", (bool,), "true or false"),
        (1.0, (int,), "a whole number from 0"),
        ("1.0", (int,), "a whole number from 0"),
        (True, (int,), "a whole number from 0"),
        ("", (int,), "a whole number from 0"),
        ("one", (float,), "a number from 0"),
        (True, (float,), "a number from 0"),
        (None, (float,), "a number from 0"),
        ([1.0], (float,), "a number from 0"),
        pytest.param(10**400, (float,), "a number from 0", id="beyond any float"),
        (1.0, (str,), "text"),
        (True, (str,), "text"),
        (None, (str,), "text"),
        ([1.0], (str,), "text"),
        ({"a": 1}, (str,), "text"),
        (True, (int, str), "a whole number from 0, or text"),
    ],
)
def test_a_value_of_another_type_is_refused(value: Any, types: tuple[type, ...], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed(value, *types)
    assert str(caught.value) == f"some.key = {value!r}: expected {expected}"


def test_a_word_stands_for_a_number_or_brings_one() -> None:
    assert (number_or("auto", 3), number_or(5, 3)) == (3, 5)
    assert split_number("oort:30", 0.0) == ("oort", 30.0)
    assert split_number("oort", 0.0) == ("oort", 0.0)
    assert split_number(0.1, 5.0) == ("", 0.1)


def test_named_values_may_hold_commas_and_equals_signs() -> None:
    assert named_values("k", "b=x,y, a=1=2", ("a", "b")) == {"b": "x,y", "a": "1=2"}
    assert named_values("k", "", ("a", "b")) == {}


@pytest.mark.parametrize("text", ["x", "c=1", "1,a=2", "a=1,a=2"])
def test_values_of_other_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^k = .*: expected a=VALUE,b=VALUE$"):
        named_values("k", text, ("a", "b"))
