"""What a model repeats of its training text: discoverable extraction and the exposure of canaries.

Greedy decoding gives a suffix back exactly where the model's first choice is the true token at every place
of it, so one pass over the true text answers what decoding 50 tokens would. Report every rate on training
text beside the same on held-out text and under the base model: common phrases are extracted too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.attacks.binomial import clopper_pearson
from fedllm.attacks.token_scores import TokenScores, part_of_text, whole
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
    """Return the suffix's part of the scores of a text that was scored whole; its first token has none."""
    return part_of_text(scores, prefix - 1, prefix - 1 + suffix)


def is_extracted(suffix: TokenScores) -> bool:
    """Return whether greedy decoding after the prefix gives the suffix (discoverable extraction)."""
    return bool(suffix.is_top.all())


def extraction_chance(suffix: TokenScores, num_samples: int) -> float:
    """Return the chance that one of `num_samples` samples at temperature 1 is the suffix.

    A text with a chance of at least p is (n, p)-discoverably extractable (Hayes et al., arXiv 2410.19482).
    """
    log_prob = float(suffix.log_probs.sum())
    if log_prob >= 0:
        return 1.0
    return -math.expm1(num_samples * math.log1p(-math.exp(log_prob)))


def extraction(suffixes: Sequence[TokenScores], confidence: float = 0.95) -> Extraction:
    """Return how many suffixes greedy decoding gives back."""
    return _counted([is_extracted(one) for one in suffixes], confidence)


def sampled_extraction(
    suffixes: Sequence[TokenScores], *, num_samples: int, chance: float, confidence: float = 0.95
) -> Extraction:
    """Return how many suffixes come with at least `chance` among `num_samples` samples."""
    return _counted([extraction_chance(one, num_samples) >= chance for one in suffixes], confidence)


def _counted(flags: Sequence[bool], confidence: float) -> Extraction:
    low, high = clopper_pearson(sum(flags), len(flags), confidence)
    return Extraction(len(flags), sum(flags), low, high)


def exposure(canary: float, others: Sequence[float]) -> float:
    """Return log2 |R| - log2 rank of a canary among texts of its own kind that were not trained on.

    `canary` and `others` are losses; |R| counts all of them, rank 1 is the smallest loss and a tie counts
    against exposure (Carlini et al., arXiv 1802.08232). At most log2 of |R|. If nothing is known every
    rank is as likely: log2 |R| - log2(|R|!) / |R| on average, 1.0 at |R| = 6, 1.4 at 100, never over 1.443.
    """
    rank = 1 + sum(other <= canary for other in others)
    return math.log2(len(others) + 1) - math.log2(rank)
