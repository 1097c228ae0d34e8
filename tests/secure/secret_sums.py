"""Secret sums of a few parties with keys that are the same in every run of the tests."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from fedllm.secure import masking
from fedllm.secure.agreement import derived, public_of
from fedllm.secure.masking import Masked
from fedllm.secure.parties import Exchange, Party, label_of
from fedllm.secure.ring import unpack

SIZE = 21


def key_of(number: int) -> bytes:
    """Return the private run key of a party."""
    return derived(b"test", "key", number)


def exchange_of(number: int, attempt: int = 0) -> Exchange:
    """Return an exchange of `number` parties."""
    parties = tuple(Party(f"site-{at}", public_of(key_of(at))) for at in range(number))
    return Exchange(label_of("run", "plan", 1, attempt, bytes(16)), parties)


@dataclass(frozen=True)
class SecretSum:
    """A secret sum with its parties' vectors, what each has sent first, and the code that made it."""

    exchange: Exchange
    vectors: Mapping[str, np.ndarray]
    masked: Mapping[str, Masked]
    code: ModuleType

    @property
    def commitments(self) -> dict[str, tuple[bytes, ...]]:
        """Each dealer's commitments."""
        return {name: masked.commitments for name, masked in self.masked.items()}

    def words(self, name: str) -> np.ndarray:
        """Return what the server sees of a party's vector."""
        return unpack(self.masked[name].packed, len(self.vectors[name]))

    def opening(self, name: str, answered: Collection[str], **changed_boxes: bytes) -> bytes:
        """Return what a party opens, of the dealers' boxes or of changed ones."""
        place = self.exchange.names.index(name)
        boxes = {dealer: self.masked[dealer].boxes[place] for dealer in answered} | changed_boxes
        commitments = {dealer: self.masked[dealer].commitments[place] for dealer in answered}
        opened: bytes = self.code.opening(name, key_of(place), self.exchange, answered, boxes, commitments)
        return opened

    def masked_sum(self, answered: Collection[str]) -> np.ndarray:
        """Return the sum of masked vectors."""
        return masking.plain_sum([self.words(name) for name in answered])

    def plain_sum(self, answered: Collection[str]) -> np.ndarray:
        """Return the sum of the vectors themselves."""
        return masking.plain_sum([self.vectors[name] for name in answered])

    def unmasked(self, answered: Collection[str], openers: Collection[str]) -> np.ndarray:
        """Return the sum as the server finds it, where `openers` answer in the second exchange."""
        openings = {name: self.opening(name, answered) for name in openers}
        for name, found in openings.items():
            self.code.check_opening(found, name, self.exchange, answered, self.commitments)
        total: np.ndarray = self.code.unmasked(self.exchange, self.masked_sum(answered), answered, openings)
        return total


def secret_sum(
    number: int, seed: int = 0, exchange: Exchange | None = None, code: ModuleType = masking
) -> SecretSum:
    """Return a secret sum of `number` parties with random vectors, all of whom have answered."""
    exchange = exchange or exchange_of(number)
    rng = np.random.default_rng(seed)
    vectors = {name: rng.integers(0, 2**24, SIZE, dtype=np.uint32) for name in exchange.names}
    masked = {
        name: code.mask(name, key_of(at), exchange, vectors[name], derived(b"machine", at))
        for at, name in enumerate(exchange.names)
    }
    return SecretSum(exchange, vectors, masked, code)
