"""The rows of a distillation step: synthetic, public or both, and others held out from them.

Synthetic text is drawn from the teachers themselves, each in proportion to its prior: it lies where their
mixture knows what it says. Without public text the held-out rows are synthetic too: fresh samples, which
like their copies are not distilled on.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from fedllm.data.public_text import PublicText
from fedllm.errors import NoDataError
from fedllm.models.chat import Encoded, encode
from fedllm.plan.distillation import HELD_OUT_SHARE, SYNTHETIC, DistillationPlan
from fedllm.runs.records import DistillationTexts
from fedllm.seeds import derive_seed
from strategies.distillation.public_text import split_texts
from strategies.distillation.synthetic_text import Text, Writers, write_synthetic_texts

PUBLIC = "public"
MOST_DOMAINS = 32  # in a record; the rest are one, "other"

# (texts, public rows that none may repeat) -> whether each may be used
Screen: TypeAlias = Callable[[Sequence[Encoded], Sequence[Encoded]], Sequence[bool]]


def pass_all(texts: Sequence[Encoded], public: Sequence[Encoded]) -> Sequence[bool]:
    """Let every text pass: the screen of runs that do not screen."""
    return [True] * len(texts)


@dataclass(frozen=True)
class Material:
    """Rows to distil on and rows held out, each with its domain.

    The domain of a synthetic text is the client whose adapter wrote it. `own` are texts of the clients'
    adapters that are only measured, next to public text: what helps there may harm where the clients are.
    There are none where the held-out rows are such texts already.
    """

    rows: tuple[Encoded, ...]
    domains: tuple[str, ...]
    held_out: tuple[Encoded, ...]
    held_out_domains: tuple[str, ...]
    own: tuple[Encoded, ...]
    texts: DistillationTexts  # their kinds and numbers, for the record


def make_material(
    plan: DistillationPlan, public: Sequence[PublicText], writers: Writers, screen: Screen = pass_all
) -> Material:
    """Return the rows of a round's step, the same for the same arguments.

    Raises:
        NoDataError: nothing is left to distil on, or to measure on.
    """
    make = _mix_with_public if public else _write_all
    train, held_out, own, texts = make(plan, public, writers, screen)
    if not train or not held_out:
        part = "to distil on" if not train else "to measure on"
        raise NoDataError(f"distill.text: no text is left {part}; raise distill.num-texts or name more text")
    rows, domains = zip(*train, strict=True)
    held_rows, held_domains = zip(*held_out, strict=True)
    texts = replace(texts, number=len(rows), num_held_out=len(held_rows))
    own_rows = tuple(row for row, _ in own)
    return Material(rows, _merge_rare(domains), held_rows, _merge_rare(held_domains), own_rows, texts)


_Parts: TypeAlias = tuple[list[Text], list[Text], list[Text], DistillationTexts]  # train, held out, own


def _mix_with_public(
    plan: DistillationPlan, public: Sequence[PublicText], writers: Writers, screen: Screen
) -> _Parts:
    """Return public texts in two parts, with synthetic ones among those to distil on if the run has both."""
    most, tokenizer = plan.numbers.max_tokens, writers.engine.base.tokenizer

    def tokens_of(text: str) -> Sequence[int]:
        # As far as it is read, or texts that begin alike would be copies that are not found.
        tokens: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:most]
        return tokens

    split = split_texts(public, plan.num_public, derive_seed(writers.seed, "public-text"), tokens_of)
    encoded = (
        [(encode(text.example, tokenizer, most), text.domain) for text in texts]
        for texts in (split.train, split.held_out)
    )
    # Of a long prompt no answer may be left: such rows teach nothing.
    wanted, held_out = ([(row, domain) for row, domain in texts if row is not None] for texts in encoded)
    train = _without_copies(wanted, held_out)
    own = write_synthetic_texts(writers, split, plan.num_held_out, most, "measured")
    written: list[Text] = []
    if plan.has_synthetic:
        number = plan.numbers.num_texts - plan.num_public
        written = write_synthetic_texts(writers, split, number, most)
    kept = _screened(written, screen, [row for row, _ in held_out])
    texts = DistillationTexts(
        kind="both" if kept else PUBLIC,
        held_out_kind=PUBLIC,
        num_removed=split.num_removed + len(wanted) - len(train),
        num_written=len(written),
        num_refused=len(written) - len(kept),
    )
    return [*train, *kept], held_out, own, texts


def _write_all(
    plan: DistillationPlan, public: Sequence[PublicText], writers: Writers, screen: Screen
) -> _Parts:
    """Return synthetic texts in two parts: those that pass the screen first are held out."""
    num_held_out, numbers = plan.num_held_out, plan.numbers
    written = write_synthetic_texts(writers, None, numbers.num_texts + num_held_out, numbers.max_tokens)
    kept = _screened(written, screen, [])
    if not kept:
        raise NoDataError(
            f"distill.text: none of {len(written)} synthetic texts is original: data holders have much of"
            " each already, or could not be asked; raise distill.num-texts, or use public text"
        )
    share = HELD_OUT_SHARE / (1 + HELD_OUT_SHARE)  # of those that are left, however few
    least = 2 if len(kept) > 3 else 1  # a single text has no standard error
    held_out = kept[: min(num_held_out, max(least, round(share * len(kept))))]
    train = _without_copies(kept[len(held_out) :], held_out)
    texts = DistillationTexts(
        kind=SYNTHETIC,
        held_out_kind=SYNTHETIC,
        num_removed=len(kept) - len(held_out) - len(train),
        num_written=len(written),
        num_refused=len(written) - len(kept),
    )
    return train, held_out, [], texts


def _screened(texts: Sequence[Text], screen: Screen, public: Sequence[Encoded]) -> list[Text]:
    if not texts:  # data holders are asked once a round, and not about nothing
        return []
    verdicts = screen([row for row, _ in texts], public)
    return [text for text, passed in zip(texts, verdicts, strict=True) if passed]


def _without_copies(texts: Sequence[Text], held_out: Sequence[Text]) -> list[Text]:
    known = {row.tokens for row, _ in held_out}
    return [text for text in texts if text[0].tokens not in known]


def _merge_rare(domains: Sequence[str]) -> tuple[str, ...]:
    """Return domains with all but the most frequent ones called "other": a record has room for some."""
    most = {domain for domain, _ in Counter(sorted(domains)).most_common(MOST_DOMAINS)}
    return tuple(domain if domain in most else "other" for domain in domains)
