"""Verbatim overlap of the server's synthetic text with private text that only its owner can read.

The server sends hashes of the token shingles of its own texts, under a fresh key. The owner hashes its rows
under the same key and answers with counts. So the server never sees private text, and a node cannot read what
adapters of other clients repeated in the texts; it can only test guesses. Shingles of 13 tokens (8 where a
text is short) are counted, runs of 50 only noticed (arXiv 2005.14165 appendix C; 2107.06499).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from fedllm.errors import DataError

SHINGLE, SHORT_SHINGLE, VERBATIM = 13, 8, 50  # tokens
SHORT_TEXT = 2 * SHINGLE  # tokens below which a text is cut into the short shingles
MOST_MATCHED = 0.2  # share of a text's shingles that may occur in private text
FEWEST_SHINGLES = 8  # in a text that is compared; fewer would ask about a phrase, as a name
STEPS = 5  # in which an owner tells the share of a text that matched; MOST_MATCHED is one of them
MAX_TEXTS = 4096  # in one query
MAX_SHINGLES = 4096  # in one text
SALT_BYTES = 16

Hashes = npt.NDArray[np.uint64]
Tokens = Sequence[int]


@dataclass(frozen=True, eq=False)
class Probe:
    """What a query holds about one text: hashes of its distinct shingles and of its runs of 50 tokens."""

    shingles: Hashes
    runs: Hashes

    def __post_init__(self) -> None:
        if max(len(self.shingles), len(self.runs)) > MAX_SHINGLES:
            raise DataError(f"a text to check has more than {MAX_SHINGLES} shingles; cut it shorter")


@dataclass(frozen=True, eq=False)
class OverlapRequest:
    """The texts a round asks about: at most 4,096 probes under one key of 16 bytes."""

    round_num: int
    salt: bytes
    probes: tuple[Probe, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.probes) <= MAX_TEXTS:
            raise DataError(f"one overlap query asks about 1 to {MAX_TEXTS} texts, not {len(self.probes)}")
        if len(self.salt) != SALT_BYTES:
            raise DataError(f"the key of an overlap query has {SALT_BYTES} bytes, not {len(self.salt)}")


@dataclass(frozen=True)
class Overlap:
    """How much of one text occurs in private text: of one owner, or the most that any of several has."""

    num_shingles: int
    num_matched: int
    verbatim: bool  # whether a run of 50 tokens occurs

    @property
    def is_original(self) -> bool:
        """Whether the text may be used. One too short for a shingle cannot be checked, so it may not."""
        return (
            self.num_shingles > 0
            and not self.verbatim
            and self.num_matched <= MOST_MATCHED * self.num_shingles
        )


def hashes(tokens: Tokens, size: int, salt: bytes) -> Hashes:
    """Return the distinct shingles of `size` tokens as sorted 64-bit keyed BLAKE2b hashes (RFC 7693).

    The size is part of the hash, so shingles of different sizes never match.
    """
    data, width = np.asarray(tokens, "<u4").tobytes(), 4 * size
    keyed = blake2b(digest_size=8, key=salt, salt=size.to_bytes(4, "little"))
    found = []
    for begin in range(0, len(data) - width + 1, 4):
        one = keyed.copy()
        one.update(data[begin : begin + width])
        found.append(one.digest())
    return np.unique(np.frombuffer(b"".join(found), "<u8")).astype(np.uint64)


def without_form(tokens: Tokens, boilerplate: Tokens) -> Tokens:
    """Return a text without the beginning it shares with `boilerplate`, the head of a chat template."""
    pairs = enumerate(zip(tokens, boilerplate, strict=False))
    shared = next((place for place, (own, form) in pairs if own != form), min(len(tokens), len(boilerplate)))
    return tokens[shared:]


def probe(tokens: Tokens, salt: bytes, boilerplate: Tokens = ()) -> Probe:
    """Return what a query asks about a text. Shingles of `boilerplate` are left out: every text has them."""
    text = without_form(tokens, boilerplate)
    size = SHORT_SHINGLE if len(text) < SHORT_TEXT else SHINGLE
    shingles, form = hashes(text, size, salt), hashes(boilerplate, size, salt)
    return Probe(np.setdiff1d(shingles, form, assume_unique=True), hashes(text, VERBATIM, salt))


def private_hashes(rows: Iterable[Tokens], salt: bytes) -> Hashes:
    """Return the shingles of every size in an owner's rows, sorted."""
    sizes = (SHORT_SHINGLE, SHINGLE, VERBATIM)
    parts = [hashes(tokens, size, salt) for tokens in rows for size in sizes]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def overlaps(probes: Sequence[Probe], private: Hashes) -> tuple[Overlap, ...]:
    """Return for every probe how much of it is among an owner's hashes."""
    return tuple(
        Overlap(
            num_shingles=len(one.shingles),
            num_matched=int(np.isin(one.shingles, private).sum()),
            verbatim=bool(np.isin(one.runs, private).any()),
        )
        for one in probes
    )


def coarse(overlap: Overlap) -> Overlap:
    """Return an overlap as it may leave its owner: whether it is original, and the share in coarse steps.

    A share up to `MOST_MATCHED` is told as none, a larger one rounded up to the next of `STEPS`: the verdict
    is the same. Of a text too short to be compared all is said to match, whatever it is, so it is not used.
    """
    number = overlap.num_shingles
    if number < FEWEST_SHINGLES:
        return Overlap(number, number, verbatim=False)
    step = -(-overlap.num_matched * STEPS // number)  # rounded up
    is_few = overlap.num_matched <= MOST_MATCHED * number
    return Overlap(number, 0 if is_few else step * number // STEPS, overlap.verbatim)


def most(answers: Sequence[Sequence[Overlap]]) -> tuple[Overlap, ...]:
    """Return for every text the most that any of several answers says, so that no owner is pointed at.

    `answers` has one answer for each owner or node, and each has one overlap for each text.
    """
    return tuple(
        Overlap(
            num_shingles=same[0].num_shingles,
            num_matched=max(one.num_matched for one in same),
            verbatim=any(one.verbatim for one in same),
        )
        for same in zip(*answers, strict=True)
    )
