from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from clients.lost_rows import RowCounts, count_rows, describe, describe_left_out
from fedllm.data.fields import Example, Turn
from fedllm.models.chat import CUT, NO_ANSWER, REFUSED, UNKNOWN_TOKEN, encode_or_cause

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>THOUGHT{% endif %}"
)


def pair(prompt: str, *system: str) -> Example:
    turns = (*(Turn("system", text) for text in system), Turn("user", prompt), Turn("assistant", "Yes."))
    return Example(turns=turns)


@pytest.fixture
def tokenizer(make_model_folder: Callable) -> Any:
    return AutoTokenizer.from_pretrained(make_model_folder())


def counted(examples: list[Example], tokenizer: Any, limit: int) -> RowCounts:
    rows = [encode_or_cause(example, tokenizer, limit) for example in examples]
    return count_rows(examples, rows, tokenizer)


def test_the_length_that_is_named_keeps_the_rows_it_promises(tokenizer: Any) -> None:
    examples = [pair("why? " * number) for number in range(1, 21)]
    counts = counted(examples, tokenizer, 40)
    assert counts.number == 20
    assert 0 < counts.num_lost == counts.kinds[CUT] < 20
    longer = sorted(counts.lengths)[18]
    assert f"train.max-length = {longer} would keep 19 of 20 whole" in describe(counts, 40)
    again = counted(examples, tokenizer, longer)
    assert again.number - sum(again.kinds.values()) == 19


def test_each_cause_has_its_own_count_and_sentence() -> None:
    kinds = Counter({CUT: 1, REFUSED: 2, NO_ANSWER: 3, UNKNOWN_TOKEN: 4, "truncated": 5})
    told = describe(RowCounts(20, kinds, (9,) * 10), 8)
    assert told.startswith(
        "10 of 20 rows are skipped: 1 rows lose their whole answer at train.max-length = 8; "
    )
    for words in ("2 rows are refused by the", "3 rows have no answer", "4 rows hold a token", "5 rows are"):
        assert f"; {words}" in told
    assert describe(RowCounts(20, Counter(), (9,) * 10), 8) == ""


def test_turns_that_a_template_moves_are_counted(tokenizer: Any) -> None:
    examples = [pair("why?", "Be brief."), pair("why?")]
    assert counted(examples, tokenizer, 99).kinds == {}
    tokenizer.chat_template = NO_SYSTEM
    assert counted(examples, tokenizer, 99).kinds == {"refused system": 1, "thought": 2}
    tokenizer.chat_template = NO_SYSTEM.replace("{{ raise_exception('no system') }}", "{% continue %}")
    assert counted(examples, tokenizer, 99).kinds == {"no system": 1, "thought": 2}
    assert counted([Example(text="why?")], tokenizer, 99).kinds == {}


def test_more_than_a_fifth_is_too_much() -> None:
    most = RowCounts(10, Counter({CUT: 2}), (9,) * 10)
    assert not most.are_too_many_lost
    assert (most + RowCounts(1, Counter({REFUSED: 1}))).are_too_many_lost
    assert not RowCounts().are_too_many_lost
    assert describe_left_out({"anna": most}, 8) == ""


def test_of_many_clients_that_lose_too_much_a_few_are_named() -> None:
    lost = RowCounts(10, Counter({CUT: 5}), (9,) * 10)
    told = describe_left_out({f"client-{number:04d}": lost for number in range(1000)}, 8)
    assert "client-0007" in told
    assert "client-0008" not in told
    assert "and 992 more clients" in told
    assert len(told) < 2000
