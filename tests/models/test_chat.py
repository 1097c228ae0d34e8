from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from fedllm.data.fields import Example, Turn
from fedllm.errors import DataError, ModelError
from fedllm.models.chat import (
    CUT,
    IGNORED,
    NO_ANSWER,
    REFUSED,
    UNKNOWN_TOKEN,
    Encoded,
    NoRow,
    chat_text,
    check_template,
    encode,
    encode_or_cause,
    fate_of_system,
    opens_answer,
)

END = 0  # the id of <|end|>
laws = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=25)
UNCLOSED = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
FORGETFUL = (  # rewrites an answer once a later turn follows it
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] if loop.last or message['role'] == 'user' else '...' }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REFUSING = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system turn: ' + message['content']) }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

REASONING = (  # writes answers without their thoughts, and has a thought open each new one
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.fixture
def tokenizer(make_model_folder: Callable) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_model_folder())


def chat(*contents: str) -> Example:
    """Return a conversation of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    return Example(turns=tuple(map(Turn, roles, contents)))


def written(tokenizer: Any, tokens: Any) -> str:
    return tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)


def learnt(row: Encoded) -> list[int]:
    assert len(row.tokens) == len(row.labels)
    assert all(label in (IGNORED, token) for token, label in zip(row.tokens, row.labels, strict=True))
    return [label for label in row.labels if label != IGNORED]


@laws
@given(prompt=texts, answer=texts)
def test_answer_and_one_end_token_alone_are_learnt(prompt: str, answer: str, tokenizer: Any) -> None:
    row = encode(chat(prompt, answer), tokenizer, 1000)
    assert written(tokenizer, row.tokens) == f"<|user|>{prompt}<|end|><|assistant|>{answer}<|end|>"
    assert written(tokenizer, learnt(row)) == f"{answer}<|end|>"
    assert row.labels[-1] == END
    assert learnt(row).count(END) == 1
    assert row.num_cut == 0
    assert row.num_supervised == len(learnt(row))


@laws
@given(contents=st.lists(texts, min_size=4, max_size=7))
def test_every_answer_of_a_conversation_is_learnt(contents: list[str], tokenizer: Any) -> None:
    row = encode(chat(*contents), tokenizer, 1000)
    answers = contents[1::2]
    assert written(tokenizer, learnt(row)) == "".join(f"{answer}<|end|>" for answer in answers)
    assert row.labels[-1] == END
    assert learnt(row).count(END) == len(answers)
    assert row.tokens.count(END) == 2 * len(answers)  # none of a last turn without an answer


@laws
@given(prompt=texts, answer=texts, max_length=st.integers(1, 60))
def test_truncation_keeps_the_beginning_and_counts_the_rest(
    prompt: str, answer: str, max_length: int, tokenizer: Any
) -> None:
    whole = encode(chat(prompt, answer), tokenizer, 1000)
    cut = encode(chat(prompt, answer), tokenizer, max_length)
    if not any(label != IGNORED for label in whole.labels[1:max_length]):
        assert cut is None
    else:
        assert cut.tokens == whole.tokens[:max_length]
        assert cut.labels == whole.labels[:max_length]
        assert cut.num_cut == max(0, len(whole.tokens) - max_length)
        assert cut.num_supervised > 0


@laws
@given(text=texts)
def test_a_plain_text_is_learnt_whole_with_one_end_token(text: str, tokenizer: Any) -> None:
    row = encode(Example(text=text), tokenizer, 1000)
    assert written(tokenizer, row.tokens) == f"{text}<|end|>"
    assert row.labels == row.tokens
    assert row.tokens.count(END) == 1
    assert row.num_supervised == len(row.tokens) - 1  # nothing stands before the first token


@laws
@given(prompt=texts, answer=texts)
def test_without_a_chat_template_the_alpaca_form_is_used(prompt: str, answer: str, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    row = encode(chat(prompt, answer), tokenizer, 1000)
    expected = f"### Instruction:\n{prompt}\n\n### Response:\n{answer}<|end|>"
    assert written(tokenizer, row.tokens) == expected
    assert written(tokenizer, learnt(row)) == f"{answer}<|end|>"
    assert row.tokens.count(END) == 1


def test_a_system_turn_is_read_and_not_learnt(tokenizer: Any) -> None:
    turns = (Turn("system", "Be kind."), Turn("user", "Sum?"), Turn("assistant", "Three."))
    row = encode(Example(turns=turns), tokenizer, 100)
    assert written(tokenizer, learnt(row)) == "Three.<|end|>"
    assert written(tokenizer, row.tokens).startswith("<|system|>Be kind.<|end|>")
    tokenizer.chat_template = None
    assert written(tokenizer, encode(Example(turns=turns), tokenizer, 100).tokens).startswith("Be kind.\n\n")


def test_an_end_token_is_added_where_the_template_writes_none(tokenizer: Any) -> None:
    tokenizer.chat_template = UNCLOSED
    row = encode(chat("Sum?", "assistant: Three."), tokenizer, 100)
    # this template has no header for the answer to come, so the whole last line is the answer
    assert written(tokenizer, row.tokens) == "user: Sum?\nassistant: assistant: Three.<|end|>"
    assert row.labels[-1] == END
    assert row.tokens.count(END) == 1


def test_answer_that_the_template_rewrites_is_not_learnt(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    row = encode(chat("One?", "First answer.", "Two?", "Second answer."), tokenizer, 100)
    assert written(tokenizer, learnt(row)) == "Second answer.<|end|>"
    assert "First" not in written(tokenizer, row.tokens)


@pytest.mark.parametrize("template", [None, "as saved"])
def test_special_tokens_are_read_once_and_not_learnt(template: str | None, tokenizer: Any) -> None:
    pad = tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A <|end|>", special_tokens=[("<|pad|>", pad), ("<|end|>", END)]
    )
    if template is None:
        tokenizer.chat_template = None
    text = encode(Example(text="Open a file."), tokenizer, 100)
    assert written(tokenizer, text.tokens) == "<|pad|>Open a file.<|end|>"
    assert written(tokenizer, learnt(text)) == "Open a file.<|end|>"
    row = encode(chat("Sum?", "Three."), tokenizer, 100)
    assert row.tokens.count(pad) == (template is None)  # a template writes its own
    assert written(tokenizer, learnt(row)) == "Three.<|end|>"


@pytest.mark.parametrize("example", [Example(), Example(text=""), Example(turns=(Turn("user", "Sum?"),))])
def test_what_has_no_answer_is_no_row(example: Example, tokenizer: Any) -> None:
    assert encode(example, tokenizer, 100) is None


def test_a_prompt_ends_where_the_answer_would_begin(tokenizer: Any) -> None:
    turns = (Turn("user", "Sum?"), Turn("assistant", "Three."))
    prompt = chat_text(tokenizer, turns[:1], prompt_answer=True)
    assert prompt == "<|user|>Sum?<|end|><|assistant|>"
    assert chat_text(tokenizer, turns).startswith(prompt)
    tokenizer.chat_template = None
    prompt = chat_text(tokenizer, turns[:1], prompt_answer=True)
    assert prompt == "### Instruction:\nSum?\n\n### Response:\n"
    assert chat_text(tokenizer, turns).startswith(prompt)


TURNS = (Turn("system", "Be kind."), Turn("user", "Sum?"), Turn("assistant", "Three."))


def test_refused_conversation_is_named_by_its_roles(tokenizer: Any) -> None:
    tokenizer.chat_template = REFUSING
    with pytest.raises(DataError) as caught:
        chat_text(tokenizer, TURNS)
    assert "system, user, assistant" in str(caught.value)
    assert not any(turn.content in str(caught.value) for turn in TURNS)
    assert caught.value.__suppress_context__, "the template's own message quotes a turn"


def test_a_refused_system_turn_begins_the_next_user_turn(tokenizer: Any) -> None:
    assert fate_of_system(tokenizer) == "written"
    tokenizer.chat_template = REFUSING
    assert fate_of_system(tokenizer) == "refused"
    row = encode(Example(turns=TURNS), tokenizer, 100)
    expected = "<|user|>Be kind.\n\nSum?<|end|><|assistant|>Three.<|end|>"
    assert written(tokenizer, row.tokens) == expected
    assert written(tokenizer, learnt(row)) == "Three.<|end|>"
    assert encode(Example(turns=TURNS[1:]), tokenizer, 100) is not None


def test_a_system_turn_that_the_template_leaves_out_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = REASONING
    assert fate_of_system(tokenizer) == "left out"


def test_an_answer_is_learnt_without_the_thought_that_prompts_open(tokenizer: Any) -> None:
    assert not opens_answer(tokenizer)
    tokenizer.chat_template = REASONING
    assert opens_answer(tokenizer)
    row = encode(chat("Sum?", "Three.", "More?", "<think>So.</think>Four."), tokenizer, 100)
    assert written(tokenizer, row.tokens) == (
        "<|user|>Sum?<|end|><|assistant|>Three.<|end|><|user|>More?<|end|><|assistant|>Four.<|end|>"
    )
    assert written(tokenizer, learnt(row)) == "Three.<|end|>Four.<|end|>"


def test_an_answer_that_is_only_context_is_not_learnt(tokenizer: Any) -> None:
    turns = (Turn("user", "A?"), Turn("assistant", "B.", learnt=False), *TURNS[1:])
    row = encode(Example(turns=turns), tokenizer, 100)
    assert written(tokenizer, learnt(row)) == "Three.<|end|>"
    assert "B." in written(tokenizer, row.tokens)


def test_why_nothing_is_learnt_is_told_case_by_case(tokenizer: Any) -> None:
    example = chat("Sum?", "Three.")
    whole = encode(example, tokenizer, 100)
    assert encode_or_cause(example, tokenizer, 2) == NoRow(CUT, len(whole.tokens))
    few = max(whole.tokens)
    assert encode_or_cause(example, tokenizer, 100, few) == NoRow(UNKNOWN_TOKEN)
    assert encode_or_cause(example, tokenizer, 100, few + 1) == whole
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}"
    assert encode_or_cause(example, tokenizer, 100) == NoRow(NO_ANSWER)
    tokenizer.chat_template = ALTERNATING
    twice = Example(turns=(Turn("user", "A?"), *TURNS[1:]))
    assert encode_or_cause(twice, tokenizer, 100) == NoRow(REFUSED)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m.content }}", "syntax error"),
        ("{{ messages | shout }}", "syntax error"),
        ("{{ absent.name }}", "is broken"),
        ("{{ messages[0].content + 1 }}", "is broken"),
        ("{{ raise_exception('never') }}", "is broken"),
        ({"rag": UNCLOSED, "tool_use": UNCLOSED}, "(rag, tool_use), none of them named default"),
    ],
)
def test_a_template_for_no_conversation_is_refused(template: Any, told: str, tokenizer: Any) -> None:
    check_template(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ModelError) as caught:
        check_template(tokenizer)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [None, REFUSING, UNCLOSED, {"default": UNCLOSED, "rag": ""}])
def test_a_template_for_a_question_and_its_answer_passes(template: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    check_template(tokenizer)
