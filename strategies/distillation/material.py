"""The rows of a distillation step: synthetic, public or both, and others held out from them.

Synthetic text is drawn from the teachers themselves, each in proportion to its prior: it lies where their
mixture knows what it says. Without public text the held-out rows are synthetic too: fresh samples, of which
none and no copy is distilled on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.config import RunConfig
from fedllm.data.example import Turn
from fedllm.distillation.sample import sample_texts
from fedllm.errors import NoDataError
from fedllm.models.chat import IGNORED, Encoded, chat_text, encode
from fedllm.seeds import derive_seed
from fedllm.training.engine import Engine
from strategies.distillation.teachers import ClientAdapter, priors_of
from strategies.distillation.text import (
    HELD_OUT_SHARE,
    PublicText,
    Split,
    has_synthetic,
    split_texts,
)

_MARK = "\x00"  # stands in for a message no user has written
_PROMPT_SHARE = 0.5  # of a text's tokens that a prompt may take at most
PUBLIC, SYNTHETIC = "public", "synthetic"
MOST_DOMAINS = 32


@dataclass(frozen=True)
class Material:
    """Rows to distil on and rows held out, each with the domain it counts in.

    The domain of a synthetic text is the client whose adapter wrote it.
    """

    rows: tuple[Encoded, ...]
    domains: tuple[str, ...]
    held_out: tuple[Encoded, ...]
    held_out_domains: tuple[str, ...]
    text: str  # synthetic | public | both
    held_out_text: str  # synthetic | public
    num_removed: int


def make_material(
    config: RunConfig,
    public: Sequence[PublicText],
    engine: Engine,
    adapters: Sequence[ClientAdapter],
    round_num: int,
) -> Material:
    """Return the rows of the step of a round, the same for the same arguments.

    Raises:
        NoDataError: nothing is left to distil on, or to measure on.
    """
    number = config.distill.num_texts
    if not public:
        return _synthetic_alone(config, engine, adapters, round_num)
    is_mixed = has_synthetic(config.distill.text)
    num_public = max(1, number // 2) if is_mixed else number
    split = split_texts(
        public,
        num_public,
        derive_seed(config.seed, "public-text"),
        lambda text: engine.base.tokenizer(text, add_special_tokens=False)["input_ids"],
    )
    train, held_out = (
        _encoded(texts, engine.base.tokenizer, config.distill.max_tokens)
        for texts in (split.train, split.held_out)
    )
    if is_mixed:
        train += _written(config, split, engine, adapters, number - num_public, round_num)
    return _material(train, held_out, "both" if is_mixed else PUBLIC, PUBLIC, split.num_removed)


def _synthetic_alone(
    config: RunConfig, engine: Engine, adapters: Sequence[ClientAdapter], round_num: int
) -> Material:
    number = config.distill.num_texts
    num_held_out = max(1, round(HELD_OUT_SHARE * number))
    found = _written(config, None, engine, adapters, number + num_held_out, round_num)
    held_out = found[:num_held_out]
    known = {row.tokens for row, _ in held_out}
    train = [(row, writer) for row, writer in found[num_held_out:] if row.tokens not in known]
    num_removed = len(found) - num_held_out - len(train)
    return _material(train, held_out, SYNTHETIC, SYNTHETIC, num_removed)


def _material(
    train: Sequence[tuple[Encoded, str]],
    held_out: Sequence[tuple[Encoded, str]],
    text: str,
    held_out_text: str,
    num_removed: int,
) -> Material:
    if not train or not held_out:
        part = "to distil on" if not train else "to measure on"
        raise NoDataError(f"distill.text: no text is left {part}; raise distill.num-texts or name more text")
    rows, domains = zip(*train, strict=True)
    held_rows, held_domains = zip(*held_out, strict=True)
    few, held_few = _few(domains), _few(held_domains)
    return Material(rows, few, held_rows, held_few, text, held_out_text, num_removed)


def _few(domains: Sequence[str]) -> tuple[str, ...]:
    """Return domains with all but those of most texts called "other": a record has room for some."""
    most = {domain for domain, _ in Counter(sorted(domains)).most_common(MOST_DOMAINS)}
    return tuple(domain if domain in most else "other" for domain in domains)


def _encoded(texts: Sequence[PublicText], tokenizer: Any, max_tokens: int) -> list[tuple[Encoded, str]]:
    """Return texts as tokens with their domains; those whose answer lies beyond the limit are left out."""
    rows = [(encode(text.example, tokenizer, max_tokens), text.domain) for text in texts]
    return [(row, domain) for row, domain in rows if row is not None]


def _written(
    config: RunConfig,
    split: Split | None,
    engine: Engine,
    adapters: Sequence[ClientAdapter],
    number: int,
    round_num: int,
) -> list[tuple[Encoded, str]]:
    """Return up to `number` texts that the clients' adapters wrote, with the writer's id.

    They begin, in this order, with the prompts of the public texts that are distilled on; the run's public
    prompts; where the clients' rows are known to be plain text, as every text begins; else with questions
    that the adapters write first (after Magpie, arXiv 2406.08464). A prompt is at most half a text long.

    Raises:
        NoDataError: every prompt is longer.
    """
    tokenizer, numbers = engine.base.tokenizer, config.distill
    most = int(numbers.max_tokens * _PROMPT_SHARE)

    def write(prompts: Sequence[Sequence[int]], length: int, name: str) -> list[tuple[Encoded, str]]:
        samples = sample_texts(
            engine,
            [adapter.vector for adapter in adapters],
            priors_of(adapters),
            prompts,
            number=number,
            max_tokens=length,
            seed=derive_seed(config.seed, name, round_num),
        )
        writers = (adapters[place].client_id for place in samples.writers)
        return list(zip(samples.rows, writers, strict=True))

    asked = [prompt.strip() for prompt in config.evaluation.prompts.split("||") if prompt.strip()]
    begins = [text.example.turns[:-1] for text in split.train if text.example.turns] if split else []
    if not split:
        begins = [(Turn("user", prompt),) for prompt in asked]
    if not split and not asked and not config.data.text_column:
        header = _tokens(tokenizer, chat_text(tokenizer, [Turn("user", _MARK)]).partition(_MARK)[0])
        questions = write([header or _begin(tokenizer)], most // 2, "synthetic-question")
        words = [tokenizer.decode(_learnt(row), skip_special_tokens=True).strip() for row, _ in questions]
        begins = [(Turn("user", question),) for question in words if question]
    prompts = [_tokens(tokenizer, chat_text(tokenizer, turns, prompt_answer=True)) for turns in begins]
    prompts = _short_enough([prompt for prompt in prompts if prompt], most) or [_begin(tokenizer)]
    texts = write(prompts, numbers.max_tokens - max(map(len, prompts)), "synthetic-text")
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


def _learnt(row: Encoded) -> list[int]:
    return [label for label in row.labels if label != IGNORED]


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return a prompt as tokens; a chat template writes its own special ones."""
    return tuple(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def _begin(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that every text begins with; where there are none, the end of the one before."""
    begin = tuple(tokenizer("", add_special_tokens=True)["input_ids"])
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return begin or (token,)
