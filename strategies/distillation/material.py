"""The rows of a distillation step: synthetic, public or both, and others held out from them.

Synthetic text is drawn from the teachers themselves, each in proportion to its prior: it lies where their
mixture knows what it says. Without public text the held-out rows are synthetic too: fresh samples, of which
none and no copy is distilled on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from fedllm.data.public_text import PublicText
from fedllm.engine.engine import Engine
from fedllm.errors import NoDataError
from fedllm.models.chat import Encoded, encode
from fedllm.plan.distillation import HELD_OUT_SHARE, SYNTHETIC
from fedllm.plan.run_plan import RunPlan, distillation_of
from fedllm.runs.records import DistillationTexts
from fedllm.seeds import derive_seed
from strategies.distillation.public_text import split_texts
from strategies.distillation.synthetic_text import Screen, anything, written
from strategies.distillation.teachers import ClientAdapter

PUBLIC = "public"
MOST_DOMAINS = 32

Text: TypeAlias = tuple[Encoded, str]  # with the domain it counts in


@dataclass(frozen=True)
class Material:
    """Rows to distil on and rows held out, each with the domain it counts in.

    The domain of a synthetic text is the client whose adapter wrote it. `own` are texts that the clients'
    adapters wrote and that are only measured: public text may lie outside what the clients know, and what
    helps there may harm here. There are none where the held-out rows are such texts already.
    """

    rows: tuple[Encoded, ...]
    domains: tuple[str, ...]
    held_out: tuple[Encoded, ...]
    held_out_domains: tuple[str, ...]
    own: tuple[Encoded, ...]
    texts: DistillationTexts  # their kinds, and how many were left out


def make_material(
    plan: RunPlan,
    public: Sequence[PublicText],
    engine: Engine,
    adapters: Sequence[ClientAdapter],
    round_num: int,
    screen: Screen = anything,
) -> Material:
    """Return the rows of the step of a round, the same for the same arguments.

    Raises:
        NoDataError: nothing is left to distil on, or to measure on.
    """
    if not public:
        return _synthetic_alone(plan, engine, adapters, round_num, screen)
    wants = distillation_of(plan)
    number, most, from_public = wants.numbers.num_texts, wants.numbers.max_tokens, wants.num_public
    split = split_texts(
        public,
        from_public,
        derive_seed(plan.config.seed, "public-text"),
        # As far as it is read, or texts that begin alike would be copies that are not found.
        lambda text: engine.base.tokenizer(text, add_special_tokens=False)["input_ids"][:most],
    )
    wanted, held_out = (
        _encoded(texts, engine.base.tokenizer, most) for texts in (split.train, split.held_out)
    )
    train = _without(wanted, held_out)
    own = written(plan, split, engine, adapters, wants.num_held_out, round_num, "measured")
    texts: list[Text] = []
    if wants.has_synthetic:
        texts = written(plan, split, engine, adapters, number - from_public, round_num)
    kept = _passed(texts, screen, [row for row, _ in held_out])
    told = DistillationTexts(
        kind="both" if kept else PUBLIC,
        held_out_kind=PUBLIC,
        num_removed=split.num_removed + len(wanted) - len(train),
        num_written=len(texts),
        num_refused=len(texts) - len(kept),
    )
    return _material([*train, *kept], held_out, [row for row, _ in own], told)


def _synthetic_alone(
    plan: RunPlan,
    engine: Engine,
    adapters: Sequence[ClientAdapter],
    round_num: int,
    screen: Screen,
) -> Material:
    wants = distillation_of(plan)
    num_held_out = wants.num_held_out
    texts = written(plan, None, engine, adapters, wants.numbers.num_texts + num_held_out, round_num)
    kept = _passed(texts, screen, [])
    if not kept:
        raise NoDataError(
            f"distill.text: none of {len(texts)} synthetic texts is original: data holders have much of each"
            " already, or could not be asked; raise distill.num-texts, or use public text"
        )
    share = HELD_OUT_SHARE / (1 + HELD_OUT_SHARE)  # of those that are left, however few
    least = 2 if len(kept) > 3 else 1  # a single text says nothing of chance
    held_out = kept[: min(num_held_out, max(least, round(share * len(kept))))]
    train = _without(kept[len(held_out) :], held_out)
    told = DistillationTexts(
        kind=SYNTHETIC,
        held_out_kind=SYNTHETIC,
        num_removed=len(kept) - len(held_out) - len(train),
        num_written=len(texts),
        num_refused=len(texts) - len(kept),
    )
    return _material(train, held_out, (), told)


def _passed(texts: Sequence[Text], screen: Screen, public: Sequence[Encoded]) -> list[Text]:
    if not texts:
        return []
    verdicts = screen([row for row, _ in texts], public)
    return [text for text, passed in zip(texts, verdicts, strict=True) if passed]


def _without(texts: Sequence[Text], held_out: Sequence[Text]) -> list[Text]:
    known = {row.tokens for row, _ in held_out}
    return [text for text in texts if text[0].tokens not in known]


def _material(
    train: Sequence[Text], held_out: Sequence[Text], own: Sequence[Encoded], texts: DistillationTexts
) -> Material:
    if not train or not held_out:
        part = "to distil on" if not train else "to measure on"
        raise NoDataError(f"distill.text: no text is left {part}; raise distill.num-texts or name more text")
    rows, domains = zip(*train, strict=True)
    held_rows, held_domains = zip(*held_out, strict=True)
    texts = replace(texts, number=len(rows), num_held_out=len(held_rows))
    return Material(rows, _few(domains), held_rows, _few(held_domains), tuple(own), texts)


def _few(domains: Sequence[str]) -> tuple[str, ...]:
    """Return domains with all but those of most texts called "other": a record has room for some."""
    most = {domain for domain, _ in Counter(sorted(domains)).most_common(MOST_DOMAINS)}
    return tuple(domain if domain in most else "other" for domain in domains)


def _encoded(texts: Sequence[PublicText], tokenizer: Any, max_tokens: int) -> list[tuple[Encoded, str]]:
    """Return texts as tokens with their domains; those of which no answer is left are left out."""
    rows = [(encode(text.example, tokenizer, max_tokens), text.domain) for text in texts]
    return [(row, domain) for row, domain in rows if row is not None]
