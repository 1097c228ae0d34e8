"""Near duplicates among texts: MinHash with locality-sensitive hashing proposes, the Jaccard index decides.

Two texts are near duplicates where their sets of 5-token shingles have a Jaccard index of at least 0.7
(Broder 1997; arXiv 2107.06499). Sketches and their index come from datasketch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

SHINGLE = 5  # tokens
NUM_PERMUTATIONS = 128
JACCARD = 0.7

Tokens = Sequence[int]
Shingles = frozenset[bytes]


def shingles(tokens: Tokens, size: int = SHINGLE) -> Shingles:
    """Return the runs of `size` tokens of a text; a shorter text is one shingle, an empty one has none."""
    data, width = np.asarray(tokens, "<u4").tobytes(), 4 * min(size, max(len(tokens), 1))
    return frozenset(data[begin : begin + width] for begin in range(0, len(data) - width + 1, 4))


def jaccard(one: Shingles, other: Shingles) -> float:
    """Return the size of the intersection over that of the union; two empty sets are alike."""
    union = len(one | other)
    return len(one & other) / union if union else 1.0


def near_duplicates(texts: Sequence[Tokens], threshold: float = JACCARD) -> tuple[int | None, ...]:
    """Return for every text the number of the earlier text that it nearly repeats, None where it is kept.

    Only kept texts are compared with, so in a chain of copies all name the first.
    """
    index, kept = _index(threshold), dict[int, Shingles]()
    found: list[int | None] = []
    for number, tokens in enumerate(texts):
        own = shingles(tokens)
        sketch = _sketch(own)
        earlier = _matches(index, sketch, own, kept, threshold)
        found.append(earlier[0] if earlier else None)
        if not earlier:
            index.insert(number, sketch)
            kept[number] = own
    return tuple(found)


def contaminated(
    texts: Sequence[Tokens], public: Sequence[Tokens], threshold: float = JACCARD
) -> tuple[bool, ...]:
    """Return for every text whether it nearly repeats one of `public`, such as a benchmark."""
    index, known = _index(threshold), dict(enumerate(map(shingles, public)))
    for number, one in known.items():
        index.insert(number, _sketch(one))
    own = [shingles(tokens) for tokens in texts]
    return tuple(bool(_matches(index, _sketch(one), one, known, threshold)) for one in own)


def _matches(
    index: Any, sketch: Any, own: Shingles, known: dict[int, Shingles], threshold: float
) -> list[int]:
    return sorted(number for number in index.query(sketch) if jaccard(own, known[number]) >= threshold)


def _index(threshold: float) -> Any:
    from datasketch import MinHashLSH  # takes scipy with it, which is slow to import

    # A missed pair stays in the set, a false one only costs the exact comparison: weigh them so.
    return MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS, weights=(0.1, 0.9))


def _sketch(own: Shingles) -> Any:
    from datasketch import MinHash

    sketch = MinHash(num_perm=NUM_PERMUTATIONS)
    if own:
        sketch.update_batch(sorted(own))  # sets have no order of their own from one process to the next
    return sketch
