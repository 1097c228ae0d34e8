"""`fedllm chat`: talk to a model; with an adapter, base model and adapter answer side by side."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clients.process import PROCESS
from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.data.fields import Turn
from fedllm.engine.engine import Engine
from fedllm.engine.generate import chat_beginning, text_beginning
from fedllm.errors import ConfigError, DataError
from fedllm.models.base import layout_of
from scripts.answers import is_plain_text
from scripts.console import NOTHING, Console
from scripts.finished_run import adapter_of, bare_config

FORMS = ("auto", "chat", "text")
_WIDE = 80  # columns of a terminal from which two answers stand side by side
_MARK = "\ufffd"  # stands at the end of a text for a letter of which tokens are to come


@dataclass
class Voice:
    """One who answers: a name, an adapter, and what was said so far. Changes as the conversation goes on."""

    name: str
    adapter: AdapterState
    turns: list[Turn] = field(default_factory=list)


@dataclass(frozen=True)
class Conversation:
    """Voices on one base model; `is_text` says that a line is continued rather than answered."""

    engine: Engine
    voices: Sequence[Voice]
    is_text: bool
    max_new_tokens: int
    choose: Callable[[torch.Tensor], torch.Tensor]

    def answer(self, line: str) -> Iterator[list[str]]:
        """Yield what each voice has said to `line` so far, longer and longer, and keep it in the end.

        Raises:
            DataError: the model's chat template refuses the conversation, or it is too long for the model.
        """
        base, said = self.engine.base, Turn("user", line)
        beginnings = [
            text_beginning(base, line) if self.is_text else chat_beginning(base, [*voice.turns, said])
            for voice in self.voices
        ]
        longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        if max(map(len, beginnings)) + self.max_new_tokens > longest:
            raise DataError(f"too long for the {longest:,} tokens that this model reads; /reset begins anew")
        tokens: list[list[int]] = [[] for _ in self.voices]
        texts = [""] * len(tokens)
        adapters = [voice.adapter for voice in self.voices]
        steps = self.engine.stream(adapters, beginnings, self.max_new_tokens, self.choose)
        with closing(steps):  # else the adapters stay on the model of one who stops listening
            for step in steps:
                for place, token in step.items():
                    tokens[place].append(token)
                texts = [base.tokenizer.decode(each, skip_special_tokens=True) for each in tokens]
                yield [text.rstrip(_MARK) for text in texts]
        yield texts
        for voice, text in zip(self.voices, texts, strict=True):
            voice.turns += [said, Turn("assistant", text.strip())]


def chat(
    target: str, *, base: str, form: str, temperature: float, max_new_tokens: int, device: str, seed: int
) -> None:
    """Answer each line of stdin until it ends or says /quit.

    Raises:
        ConfigError: `form` is none of `FORMS`.
        FedLLMError: model or adapter cannot be loaded.
    """
    if form not in FORMS:
        raise ConfigError(f"--as {form}: expected one of {', '.join(FORMS)}")
    console = Console()
    engine, voices, is_text = open_voices(target, base, device, console)
    draw = torch.Generator(engine.base.device).manual_seed(seed)
    conversation = Conversation(
        engine,
        voices,
        is_text if form == "auto" else form == "text",
        max_new_tokens,
        lambda logits_BV: choose(logits_BV, temperature, draw),
    )
    is_live = console.is_live and sys.stdin.isatty()
    if is_live:
        does = "continues" if conversation.is_text else "answers"
        console.line(f"{engine.base.files.public_name} {does} what you type; /reset forgets it, /quit ends")
    for line in _lines(is_live):
        if line == "/quit":
            return
        if line == "/reset":
            for voice in voices:
                voice.turns.clear()
        elif line:
            try:
                _show(conversation, line, console, is_live)
            except DataError as error:
                console.line(str(error))


def open_voices(target: str, base: str, device: str, console: Console) -> tuple[Engine, list[Voice], bool]:
    """Return the voices of a run, an adapter folder or a model, and whether the rows were plain text."""
    folder = Path(target)
    if not (folder / "config.toml").is_file() and not (folder / "adapter_config.json").is_file():
        model = PROCESS.resident.base(ModelConfig(name=target, device=device))
        layout = layout_of(model.model, LoraConfig(rank=1), model.fingerprint)
        engine = PROCESS.resident.engine(ModelConfig(name=target, device=device), layout)
        return engine, [Voice("model", initial_adapter(layout, 0))], not model.tokenizer.chat_template
    with adapter_of(folder) as found:
        if found.note:
            console.line(found.note)
        published = load_adapter(found.folder)
        config = (found.config or bare_config(published)).override({"model.device": device})
        config = config.override({"model.name": base}) if base else config
        engine = PROCESS.resident.engine(config.model, published.state.layout, config.train.token_budget)
        voices = [
            Voice("base", initial_adapter(published.state.layout, 0)),
            Voice("adapter", published.state),
        ]
        return engine, voices, found.config is not None and is_plain_text(found.config)


def choose(logits_BV: torch.Tensor, temperature: float, draw: torch.Generator) -> torch.Tensor:
    """Return the likeliest token of every row, or at a temperature above 0 one that is drawn."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    shares_BV = (logits_BV.float() / temperature).softmax(dim=-1)
    return torch.multinomial(shares_BV, 1, generator=draw)[:, 0]


def _lines(is_live: bool) -> Iterator[str]:
    """Yield what is typed, or the lines that are piped in; bytes that are no text become U+FFFD."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            yield (input("> ") if is_live else input()).strip()
        except EOFError:
            return


def _show(conversation: Conversation, line: str, console: Console, is_live: bool) -> None:
    names = [voice.name for voice in conversation.voices]
    if is_live:
        with Live(console=console.rich, refresh_per_second=12) as live:
            for texts in conversation.answer(line):
                live.update(_page(names, texts, console.rich.width))
        return
    *_, texts = conversation.answer(line)
    console.line(f"> {line}")
    width = max(map(len, names)) + 1
    for name, text in zip(names, texts, strict=True):
        console.line(f"{name + ':':<{width}} {' '.join(text.split()) or NOTHING}")


def _page(names: Sequence[str], texts: Sequence[str], width: int) -> Table | Group:
    """Return answers side by side where there is room, else one below the other."""
    if len(names) > 1 and width < _WIDE:
        return Group(*(Text(f"{name}: {text}\n") for name, text in zip(names, texts, strict=True)))
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*map(Text, texts))
    return table
