"""Masked sums: equal to the plain sum whoever is lost, and every wrong message named."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest

from fedllm.secure.agreement import derived, public_of
from fedllm.secure.masking import (
    Masked,
    check_opening,
    mask,
    opening,
    plain_sum,
    unmasked,
)
from fedllm.secure.parties import Exchange, Party, label_of, threshold_of
from fedllm.secure.ring import unpack

SIZE = 21


def key_of(number: int) -> bytes:
    return derived(b"test", "key", number)


@dataclass(frozen=True)
class Sum:
    """A secret sum of n parties with their vectors, and what each has sent first."""

    exchange: Exchange
    vectors: dict[str, np.ndarray]
    masked: dict[str, Masked]

    def opened(self, name: str, answered: Collection[str]) -> bytes:
        place = self.exchange.names.index(name)
        return opening(
            name,
            key_of(place),
            self.exchange,
            answered,
            {dealer: self.masked[dealer].boxes[place] for dealer in answered},
            {dealer: self.masked[dealer].commitments[place] for dealer in answered},
        )

    def masked_sum(self, answered: Collection[str]) -> np.ndarray:
        return plain_sum([unpack(self.masked[name].packed, SIZE) for name in answered])

    def commitments(self) -> dict[str, tuple[bytes, ...]]:
        return {name: masked.commitments for name, masked in self.masked.items()}

    def unmasked(self, answered: Collection[str], openers: Collection[str]) -> np.ndarray:
        openings = {name: self.opened(name, answered) for name in openers}
        for name, found in openings.items():
            check_opening(found, name, self.exchange, answered, self.commitments())
        return unmasked(self.exchange, self.masked_sum(answered), answered, openings)


def exchange_of(number: int, attempt: int = 0) -> Exchange:
    parties = tuple(Party(f"site-{at}", public_of(key_of(at))) for at in range(number))
    return Exchange(label_of("run", "plan", 1, attempt, bytes(16)), parties)


def secret_sum(number: int, seed: int = 0) -> Sum:
    exchange, rng = exchange_of(number), np.random.default_rng(seed)
    vectors = {name: rng.integers(0, 2**24, SIZE, dtype=np.uint32) for name in exchange.names}
    masked = {
        name: mask(name, key_of(at), exchange, vectors[name], derived(b"machine", at))
        for at, name in enumerate(exchange.names)
    }
    return Sum(exchange, vectors, masked)


def subsets(names: Collection[str], least: int) -> Iterator[tuple[str, ...]]:
    for number in range(least, len(names) + 1):
        yield from combinations(names, number)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_every_loss_in_both_exchanges_gives_the_plain_sum(number: int) -> None:
    found = secret_sum(number)
    threshold = threshold_of(number)
    for answered in subsets(found.exchange.names, threshold):
        expected = plain_sum([found.vectors[name] for name in answered])
        for openers in subsets(answered, threshold):
            assert np.array_equal(found.unmasked(answered, openers), expected)
