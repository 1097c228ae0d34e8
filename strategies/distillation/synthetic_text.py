"""Synthetic text: what a round's clients' adapters write, and which of it is new enough to learn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.data.fields import Turn, mapped_columns
from fedllm.distillation.sample import sample_texts
from fedllm.distillation.targets import learnt_tokens
from fedllm.engine.engine import Engine
from fedllm.errors import DataError, NoDataError
from fedllm.models.chat import Encoded, chat_text, form_tokens
from fedllm.originality.verdict import FILE, Provenance, Screening, write_screening
from fedllm.plan.run_plan import RunPlan, distillation_of
from fedllm.seeds import derive_seed
from strategies.distillation.originality import known_to_one, screen
from strategies.distillation.public_text import Split
from strategies.distillation.teachers import ClientAdapter, digest_of, priors_of
from strategies.session import Session

_MARK = "\x00"  # stands in for a message no user has written
_PROMPT_SHARE = 0.5  # of a text's tokens that a prompt may take at most
UNSTATED = "not stated by the run; the terms of the base model and of the data holders bind"

# (texts, public rows that none may repeat) -> whether each may be used
Screen = Callable[[Sequence[Encoded], Sequence[Encoded]], Sequence[bool]]


def anything(texts: Sequence[Encoded], public: Sequence[Encoded]) -> Sequence[bool]:
    """Let every text pass: for runs that do not screen."""
    return [True] * len(texts)


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of originality for the texts of one round; verdicts are kept in the run's folder, if any.

    It asks the data holders, which answer one such query a round.
    """

    session: Session
    engine: Engine
    adapters: Sequence[ClientAdapter]
    round_num: int
    folder: Path | None = None

    def __call__(self, texts: Sequence[Encoded], public: Sequence[Encoded]) -> Sequence[bool]:
        """Return whether each text passes, and write `synthetic.json`."""
        vectors = [adapter.vector for adapter in self.adapters]
        verdicts = screen(
            self.session,
            texts,
            round_num=self.round_num,
            boilerplate=form_tokens(self.engine.base.tokenizer),
            public=public,
            known=known_to_one(self.engine, vectors, texts),
        )
        if self.folder is not None:
            write_screening(self.folder / FILE, Screening(self._provenance(), verdicts))
        return [verdict.passed for verdict in verdicts]

    def _provenance(self) -> Provenance:
        config = self.session.config
        return Provenance(
            run=config.run.name,
            round_num=self.round_num,
            model=config.model.name,
            fingerprint=self.session.layout.fingerprint,
            source="client adapters",
            adapters=tuple(digest_of(adapter) for adapter in self.adapters),
            seed=config.seed,
            temperature=1.0,
            licence=config.distill.licence or UNSTATED,
        )


def written(
    plan: RunPlan,
    split: Split | None,
    engine: Engine,
    adapters: Sequence[ClientAdapter],
    number: int,
    round_num: int,
    name: str = "synthetic",
) -> list[tuple[Encoded, str]]:
    """Return up to `number` texts that the clients' adapters wrote, with the writer's id.

    They begin, in this order, with the prompts of the public texts that are distilled on; the run's public
    prompts; where the clients' rows are known to be plain text, or the public texts are, as every text
    begins; else with questions that the adapters write first (after Magpie, arXiv 2406.08464). A prompt is at
    most half a text long.
    Other names give other texts.

    Raises:
        NoDataError: every prompt is longer.
    """
    tokenizer, numbers = engine.base.tokenizer, distillation_of(plan).numbers
    most = int(numbers.max_tokens * _PROMPT_SHARE)

    def write(prompts: Sequence[Sequence[int]], length: int, part: str) -> list[tuple[Encoded, str]]:
        samples = sample_texts(
            engine,
            [adapter.vector for adapter in adapters],
            priors_of(adapters),
            prompts,
            number=number,
            max_tokens=length,
            seed=derive_seed(plan.config.seed, f"{name}-{part}", round_num),
        )
        writers = (adapters[place].client_id for place in samples.writers)
        return list(zip(samples.rows, writers, strict=True))

    begins = [text.example.turns[:-1] for text in split.train if text.example.turns] if split else []
    begins = begins or [(Turn("user", prompt),) for prompt in plan.prompts]
    if not begins and not split and "text" not in mapped_columns(plan.config.data.columns):
        header = _tokens(tokenizer, chat_text(tokenizer, [Turn("user", _MARK)]).partition(_MARK)[0])
        questions = write([header or _begin(tokenizer)], most // 2, "question")
        words = [
            tokenizer.decode(learnt_tokens(row), skip_special_tokens=True).strip() for row, _ in questions
        ]
        begins = [(Turn("user", question),) for question in words if question]
    prompts = [_prompt(tokenizer, turns) for turns in begins]
    prompts = _short_enough([prompt for prompt in prompts if prompt], most) or [_begin(tokenizer)]
    texts = write(prompts, numbers.max_tokens - max(map(len, prompts)), "text")
    return [(row, writer) for row, writer in texts if row.num_supervised]


def _short_enough(prompts: Sequence[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """Return the prompts of at most `most` tokens.

    Raises:
        NoDataError: there are prompts, and all are longer.
    """
    kept = [prompt for prompt in prompts if len(prompt) <= most]
    if prompts and not kept:
        raise NoDataError(
            f"distill.max-tokens: the shortest prompt of synthetic text has {min(map(len, prompts))} tokens"
            f" and may take {most}, half of a text; raise it"
        )
    return kept


def _prompt(tokenizer: Any, turns: Sequence[Turn]) -> tuple[int, ...]:
    """Return what comes before an answer as tokens; none where the chat template refuses it."""
    try:
        return _tokens(tokenizer, chat_text(tokenizer, turns, prompt_answer=True))
    except DataError:
        return ()


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return a prompt as tokens; a chat template writes its own special ones."""
    return tuple(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def _begin(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that every text begins with; where there are none, the end of the one before."""
    begin = tuple(tokenizer("", add_special_tokens=True)["input_ids"])
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return begin or (token,)
