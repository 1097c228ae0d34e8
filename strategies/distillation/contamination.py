"""Texts that are nearly copies of held-out ones: left in, they would make a held-out loss a test of memory.

MinHash over shingles of five words with 128 permutations (Broder 1997), by the library datasketch; what it
proposes is compared exactly, and a copy has a Jaccard similarity of at least 0.7.
"""

import importlib.util
import re
from collections.abc import Sequence

from fedllm.errors import MissingExtraError

SHINGLE = 5
PERMUTATIONS = 128
SIMILAR = 0.7
_PROPOSED = 0.5  # below SIMILAR, since MinHash only estimates; the exact comparison has the last word
_WORD = re.compile(r"\w+|[^\w\s]")


def needs_datasketch() -> None:
    """Return where datasketch is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("datasketch") is None:
        raise MissingExtraError(
            "distill.text names public text, whose near copies datasketch finds:"
            " `pip install 'fedllm[distill]'`, or use distill.text = synthetic"
        )


def near_copies(texts: Sequence[str], held_out: Sequence[str]) -> list[bool]:
    """Return for every text whether it is nearly a copy of a held-out one.

    Raises:
        MissingExtraError: datasketch is absent.
    """
    needs_datasketch()
    from datasketch import MinHash, MinHashLSH

    def sketch(shingles: frozenset[str]) -> MinHash:
        found = MinHash(num_perm=PERMUTATIONS, seed=1)
        found.update_batch([shingle.encode() for shingle in sorted(shingles)])
        return found

    known = [shingles_of(text) for text in held_out]
    index = MinHashLSH(threshold=_PROPOSED, num_perm=PERMUTATIONS)
    for number, shingles in enumerate(known):
        index.insert(number, sketch(shingles))
    return [
        any(jaccard(shingles, known[number]) >= SIMILAR for number in index.query(sketch(shingles)))
        for shingles in map(shingles_of, texts)
    ]


def shingles_of(text: str) -> frozenset[str]:
    """Return all runs of five words and marks, in small letters; a shorter text is one shingle."""
    words = _WORD.findall(text.lower())
    runs = range(max(1, len(words) - SHINGLE + 1))
    return frozenset(" ".join(words[begin : begin + SHINGLE]) for begin in runs)


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the shared part of two sets: |A and B| / |A or B|."""
    return len(first & second) / len(first | second)
