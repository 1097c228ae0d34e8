"""Greedy answers to a batch of prompts, and continuations whose tokens the caller chooses.

Tensor suffixes: B row of the batch, t its token, S token that it writes, E end token, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from fedllm.data.fields import Turn
from fedllm.engine.reading import FixedReader, GrowingReader, left_padded, recorded
from fedllm.models.base import BaseModel
from fedllm.models.chat import chat_text

READ_EVERY = 16  # tokens of a GPU between two looks at whether all rows have ended: each look waits for it


class Choice(Protocol):
    """Chooses the next token of every row from the model's own logits at temperature 1."""

    def __call__(self, rows: range, step_1: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return the tokens [B] that `rows`, places among all beginnings, write at step `step_1` [1].

        It stays on the device of the logits: a value read back would stop a GPU at every token.
        """


def answers(
    base: BaseModel, prompts: Sequence[str], max_new_tokens: int, *, as_plain_text: bool = False
) -> list[str]:
    """Return what the model, with the adapters that are attached to it, answers to each prompt.

    Under `as_plain_text` a prompt is no user's turn but the beginning of a text, which is continued.
    """
    tokenizer = base.tokenizer
    rows = [
        text_beginning(base, prompt) if as_plain_text else chat_beginning(base, [Turn("user", prompt)])
        for prompt in prompts
    ]
    # Some tokenizers have no padding token; which one it is does not matter, since the mask hides it.
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    inputs_Bt, mask_Bt = left_padded(rows, filler, base.device)
    output = base.model.generate(
        input_ids=inputs_Bt,
        attention_mask=mask_Bt,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=filler,
    )
    new_tokens = output[:, inputs_Bt.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def text_beginning(base: BaseModel, text: str) -> list[int]:
    """Return the tokens of the beginning of a plain text, which the model continues."""
    return list(base.tokenizer(text)["input_ids"])


def chat_beginning(base: BaseModel, turns: Sequence[Turn]) -> list[int]:
    """Return the tokens of a conversation that the model answers.

    Raises:
        DataError: the model's chat template refuses it.
    """
    tokenizer = base.tokenizer
    text = chat_text(tokenizer, turns, prompt_answer=True)
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def stream(
    base: BaseModel,
    beginnings: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[dict[int, int]]:
    """Yield step by step which token each row writes; rows that have ended are left out.

    As `continuations`, for a person who watches; `choose` takes logits [B, V] and returns tokens [B].
    """
    reader, ends = GrowingReader(base, beginnings, max_new_tokens), end_tokens(base)
    alive, next_B = set(range(len(beginnings))), torch.empty(0)
    for step in range(max_new_tokens):
        next_B = choose(reader.next(next_B[:, None]) if step else reader.first())
        written = {row: token for row, token in enumerate(next_B.tolist()) if row in alive}
        yield written
        alive -= {row for row, token in written.items() if token in ends}
        if not alive:
            return


def continuations(
    base: BaseModel,
    beginnings: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    is_fixed: bool = False,
) -> list[tuple[int, ...]]:
    """Return the tokens that `choose`, given (step [1], logits [B, V]), takes after each beginning.

    A beginning has at least one token. A row ends with its first end token, which is part of it, or after
    `max_new_tokens`. `choose` sees the model's own logits at temperature 1: no setting of the model's
    generation counts. `is_fixed` gives the cache its last size from the start (`can_be_fixed`), and on a GPU
    makes the step from token to token one CUDA graph.
    """
    written = Written(len(beginnings), max_new_tokens, end_tokens(base), base.device)
    reader = (FixedReader if is_fixed else GrowingReader)(base, beginnings, max_new_tokens)
    on_gpu = base.device.type == "cuda"

    def step() -> None:
        written.take(choose(written.step_1, reader.next(written.last_B1)))

    written.take(choose(written.step_1, reader.first()))
    for number in range(1, max_new_tokens):
        if number % (READ_EVERY if on_gpu else 1) == 0 and written.is_complete:
            break
        if number == 2 and is_fixed and on_gpu:  # the first step has chosen and warmed all kernels up
            step = recorded(step, base.device)
        step()
    return written.rows()


class Written:
    """What the rows of a batch have written, kept on their device until all is done."""

    def __init__(self, number: int, most: int, ends: Iterable[int], device: torch.device):
        self.last_B1 = torch.zeros(number, 1, dtype=torch.int64, device=device)
        self.step_1 = torch.zeros(1, dtype=torch.int64, device=device)  # tokens written so far
        self._tokens_BS = torch.zeros(number, most, dtype=torch.int64, device=device)
        self._ended_B = torch.zeros(number, dtype=torch.bool, device=device)
        self._ends = frozenset(ends)
        self._ends_E = torch.tensor(sorted(self._ends), dtype=torch.int64, device=device)

    def take(self, next_B: torch.Tensor) -> None:
        """Add every row's next token. One that has ended goes on; `rows` leaves out what follows."""
        self.last_B1.copy_(next_B[:, None])
        self._tokens_BS.index_copy_(1, self.step_1, self.last_B1)
        self._ended_B.logical_or_((self.last_B1 == self._ends_E).any(dim=1))
        self.step_1.add_(1)

    @property
    def is_complete(self) -> bool:
        """Whether all rows have ended; waits for the device."""
        return bool(self._ended_B.all())

    def rows(self) -> list[tuple[int, ...]]:
        """Return what each row has written, up to and with its first end token; waits for the device."""
        rows = self._tokens_BS[:, : int(self.step_1)].tolist()
        lengths = (
            next((n for n, token in enumerate(row, 1) if token in self._ends), len(row)) for row in rows
        )
        return [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def end_tokens(base: BaseModel) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    named = base.model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in (base.tokenizer.eos_token_id, *listed) if token is not None)
