"""What a model repeats of its training text: discoverable extraction and the exposure of canaries.

Greedy decoding gives a suffix back exactly where the model's first choice is the true token at every place,
so one pass over the true text answers what decoding 50 tokens would. Common phrases are extracted too: report
every rate on training text together with the rate on held-out text and the rate of the base model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from fedllm.attacks.binomial import clopper_pearson
from fedllm.attacks.canaries import Canary
from fedllm.attacks.token_scores import TokenScores, whole
from fedllm.models.chat import Encoded

PREFIX, SUFFIX = 50, 50  # tokens (Carlini et al., arXiv 2202.07646)


@dataclass(frozen=True)
class Extraction:
    """How many of `number` texts a model gives back, with Clopper-Pearson bounds of the share."""

    number: int
    extracted: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """The share of texts given back; 0 of none."""
        return self.extracted / self.number if self.number else 0.0


def extractable(rows: Sequence[Encoded], prefix: int = PREFIX, suffix: int = SUFFIX) -> list[Encoded]:
    """Return the beginnings of the rows that are long enough: prefix and suffix, to be scored whole."""
    length = prefix + suffix
    return [whole(row.tokens[:length]) for row in rows if len(row.tokens) >= length]


def suffix_of(scores: TokenScores, prefix: int = PREFIX, suffix: int = SUFFIX) -> TokenScores:
    """Return the scores of the suffix, from those of the whole text."""
    begin = prefix - 1  # a text's first token is predicted from nothing, so it has no score
    return TokenScores(*(getattr(scores, item.name)[begin : begin + suffix] for item in fields(scores)))


def is_extracted(suffix: TokenScores) -> bool:
    """Return whether greedy decoding after the prefix gives the suffix (discoverable extraction)."""
    return bool(suffix.is_top.all())


def extraction(suffixes: Sequence[TokenScores], confidence: float = 0.95) -> Extraction:
    """Return how many suffixes greedy decoding gives back."""
    extracted = sum(is_extracted(one) for one in suffixes)
    low, high = clopper_pearson(extracted, len(suffixes), confidence)
    return Extraction(len(suffixes), extracted, low, high)


def exposure(canary: float, others: Sequence[float]) -> float:
    """Return log2 |R| - log2 rank of a canary among texts of its own kind that were not trained on.

    `canary` and `others` are losses; |R| counts all of them, rank 1 is the smallest loss and a tie counts
    against exposure (Carlini et al., arXiv 1802.08232). At most log2 |R|. A model that has not seen the
    canary gives every rank alike: log2 |R| - log2(|R|!) / |R| on average, 1.4 at |R| = 100, at most 1.443.
    """
    rank = 1 + sum(other <= canary for other in others)
    return math.log2(len(others) + 1) - math.log2(rank)


def exposures(canaries: Sequence[Canary], losses: Sequence[float]) -> Mapping[int, tuple[float, ...]]:
    """Return the exposures of the included canaries by how often each was repeated.

    `losses` has the loss of every canary under the model that is audited. Each included canary is ranked
    among all that stayed out.
    """
    others = [loss for one, loss in zip(canaries, losses, strict=True) if not one.included]
    found: dict[int, list[float]] = {}
    for one, loss in zip(canaries, losses, strict=True):
        if one.included:
            found.setdefault(one.repeats, []).append(exposure(loss, others))
    return {number: tuple(found[number]) for number in sorted(found)}
