"""Synthetic text: what the clients' adapters of a round write, to distil on or to measure on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedllm.data.fields import Turn, mapped_columns
from fedllm.distillation.sample import sample_texts
from fedllm.engine.engine import Engine
from fedllm.errors import DataError, NoDataError
from fedllm.models.chat import Encoded, chat_text
from fedllm.plan.run_plan import RunPlan
from fedllm.seeds import derive_seed
from strategies.distillation.public_text import Split
from strategies.distillation.teachers import ClientAdapter, priors_of

Text: TypeAlias = tuple[Encoded, str]  # with its domain; for a synthetic text, the client that wrote it
Tokens: TypeAlias = tuple[int, ...]

_MARK = "\x00"  # stands in for a message no user has written
_PROMPT_SHARE = 0.5  # of a text's tokens that a prompt may take at most


@dataclass(frozen=True, eq=False)
class Writers:
    """The clients' adapters of a round, which write text, and what is known of how their rows begin.

    `prompts` are the run's public prompts; `is_plain` says that clients' rows are plain text, not chats.
    """

    engine: Engine
    adapters: Sequence[ClientAdapter]
    seed: int  # the run's
    round_num: int
    prompts: tuple[str, ...]
    is_plain: bool

    def write(self, prompts: Sequence[Tokens], number: int, max_tokens: int, name: str) -> list[Text]:
        """Return `number` texts that continue prompts by `max_tokens` at most; other names, other texts."""
        samples = sample_texts(
            self.engine,
            [adapter.vector for adapter in self.adapters],
            priors_of(self.adapters),
            prompts,
            number=number,
            max_tokens=max_tokens,
            seed=derive_seed(self.seed, name, self.round_num),
        )
        writers = (self.adapters[place].client_id for place in samples.writers)
        return list(zip(samples.rows, writers, strict=True))


def writers_of(plan: RunPlan, engine: Engine, adapters: Sequence[ClientAdapter], round_num: int) -> Writers:
    """Return the clients' adapters of a round as writers."""
    is_plain = "text" in mapped_columns(plan.config.data.columns)
    return Writers(engine, adapters, plan.config.seed, round_num, plan.prompts, is_plain)


def write_synthetic_texts(
    writers: Writers, split: Split | None, number: int, max_tokens: int, name: str = "synthetic"
) -> list[Text]:
    """Return up to `number` texts of at most `max_tokens` that the clients' adapters wrote.

    They continue the first of these prompts that there are: those of the public texts to distil on; the run's
    public prompts; the beginning of every text, if clients' rows or public texts are plain; else questions
    that the adapters write first (after Magpie, arXiv 2406.08464).

    Raises:
        NoDataError: every prompt takes more than half of a text.
    """
    tokenizer, most = writers.engine.base.tokenizer, int(max_tokens * _PROMPT_SHARE)
    begins = [text.example.turns[:-1] for text in split.train if text.example.turns] if split else []
    begins = begins or [(Turn("user", prompt),) for prompt in writers.prompts]
    if not begins and not split and not writers.is_plain:
        header = _tokens(tokenizer, chat_text(tokenizer, [Turn("user", _MARK)]).partition(_MARK)[0])
        # A question takes half of what a prompt may: the template's marks around it need room too.
        asked = writers.write([header or _begin(tokenizer)], number, most // 2, f"{name}-question")
        words = [tokenizer.decode(row.learnt_tokens, skip_special_tokens=True).strip() for row, _ in asked]
        begins = [(Turn("user", question),) for question in words if question]
    prompts = [prompt for prompt in (_prompt(tokenizer, turns) for turns in begins) if prompt]
    kept = [prompt for prompt in prompts if len(prompt) <= most]
    if prompts and not kept:
        raise NoDataError(
            f"distill.max-tokens: the shortest prompt of synthetic text has {min(map(len, prompts))} tokens"
            f" and may take {most}, half of a text; raise it"
        )
    prompts = kept or [_begin(tokenizer)]
    texts = writers.write(prompts, number, max_tokens - max(map(len, prompts)), f"{name}-text")
    return [(row, writer) for row, writer in texts if row.num_supervised]


def _prompt(tokenizer: Any, turns: Sequence[Turn]) -> Tokens:
    """Return what comes before an answer as tokens; none where the chat template refuses it."""
    try:
        return _tokens(tokenizer, chat_text(tokenizer, turns, prompt_answer=True))
    except DataError:
        return ()


def _tokens(tokenizer: Any, text: str) -> Tokens:
    # A chat template writes special tokens of its own, so the tokenizer must not add them again.
    return tuple(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def _begin(tokenizer: Any) -> Tokens:
    """Return the tokens that every text begins with; where there are none, the end of the one before."""
    begin = tuple(tokenizer("", add_special_tokens=True)["input_ids"])
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return begin or (token,)
