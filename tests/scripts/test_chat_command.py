"""`fedllm chat`: what each voice says is what the engine answers, streamed; pipes and plain text too."""

import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedllm.adapters.folder import save_adapter
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.data.fields import Turn
from fedllm.engine.engine import Engine
from fedllm.engine.generate import chat_beginning
from fedllm.errors import DataError
from fedllm.models.base import BaseModel
from scripts import cli
from scripts.commands.chat_command import Conversation, Voice, choose
from tests.builders import engine_on


@pytest.fixture
def engine(load_tiny: Callable[..., BaseModel]) -> Engine:
    return engine_on(load_tiny(), rank=4)


def states(engine: Engine) -> tuple[AdapterState, AdapterState]:
    """Return an adapter that changes nothing, and one of random numbers."""
    draw = torch.Generator().manual_seed(3)
    vector = torch.randn(engine.layout.size, generator=draw) * 0.3
    return initial_adapter(engine.layout, 0), AdapterState(engine.layout, vector)


def conversation(engine: Engine, *, is_text: bool = False, most: int = 12) -> Conversation:
    voices = [Voice(name, state) for name, state in zip(("base", "adapter"), states(engine), strict=True)]
    return Conversation(engine, voices, is_text, most, lambda logits: logits.argmax(dim=-1))


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # gemma2: each voice has a pass of its own
def test_voices_say_what_the_engine_answers(kind: str, is_text: bool, load_tiny: Callable) -> None:
    engine = engine_on(load_tiny(kind), rank=4)
    *_, texts = conversation(engine, is_text=is_text).answer("Sort the list")
    wanted = engine.generate(states(engine), ["Sort the list"] * 2, 12, as_plain_text=is_text)
    assert [text.strip() for text in texts] == wanted


def test_answers_grow_and_each_voice_remembers_its_own(engine: Engine) -> None:
    talk = conversation(engine)
    shown = list(talk.answer("Sort the list"))
    for before, after in itertools.pairwise(shown):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))
    first = [voice.turns for voice in talk.voices]
    assert [turns[0] for turns in first] == [Turn("user", "Sort the list")] * 2
    assert first[0][1].content == shown[-1][0].strip()
    *_, texts = talk.answer("Again")
    alone = engine.stream(
        [states(engine)[0]],
        [chat_beginning(engine.base, [*first[0][:2], Turn("user", "Again")])],
        12,
        lambda logits: logits.argmax(dim=-1),
    )
    tokens = [step[0] for step in alone]
    assert engine.base.tokenizer.decode(tokens, skip_special_tokens=True) == texts[0]


def test_a_conversation_that_is_too_long_says_so(engine: Engine) -> None:
    with pytest.raises(DataError, match="/reset"):
        next(conversation(engine, most=10**6).answer("Sort the list"))


def test_who_stops_listening_leaves_the_model_as_it_was(engine: Engine) -> None:
    names = [type(module) for module in engine.base.model.modules()]
    answer = conversation(engine).answer("Sort the list")
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert [type(module) for module in engine.base.model.modules()] == names


def test_draws_follow_seed_and_temperature() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    assert choose(logits, 0, torch.Generator()).equal(logits.argmax(dim=-1))
    one, two = (choose(logits, 1.0, torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.equal(two)
    assert not one.equal(logits.argmax(dim=-1))


def test_piped_lines_are_answered_one_by_one(
    engine: Engine,
    make_model_folder: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    save_adapter(
        tmp_path / "a", states(engine)[1], base_model="tiny", revision="", target_modules=["q_proj"], card=""
    )
    typed = b"Sort the list\n\n/reset\nSort the list\n/reset\nS\xff\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
    words = [
        "fedllm",
        "chat",
        str(tmp_path / "a"),
        "--base",
        str(make_model_folder()),
        "--max-new-tokens",
        "12",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [">", "base:", "adapter:"] * 3
    assert lines[:3] == lines[3:6]  # forgotten in between
    assert lines[6] == "> S\ufffd"  # a byte that is no text
    assert "never" not in " ".join(lines)
