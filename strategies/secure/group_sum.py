"""One secret sum as the server sees it: masked answers that add up, and shares that open their sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedllm.errors import SecureError, TooFewPartiesError
from fedllm.privacy.distributed import SharedNoise
from fedllm.secure.masking import Masked, check_masked, check_opening, unmasked
from fedllm.secure.parties import Exchange
from fedllm.secure.ring import unpack
from fedllm.secure.vector import SecretSum, read_sum
from fedllm.wire.masks import AskedSum, Unmasking
from strategies.exchange.validation import ROUNDING


@dataclass(eq=False)
class GroupSum:
    """The sum of one group of parties in one attempt at a round.

    `clients` has those that each party speaks for, `noise` what each party adds to its delta, if anything. Of
    all vectors only their sum is kept, `words` [n]; of each party that has answered, its boxes and
    commitments. `members` are the clients in the sum. `faults` says of parties that have broken the protocol
    what they did.
    """

    asked: AskedSum
    clients: Mapping[str, tuple[str, ...]]
    words: np.ndarray
    noise: SharedNoise | None = None
    masked: dict[str, Masked] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    openings: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def exchange(self) -> Exchange:
        """Its label and parties."""
        return self.asked.exchange

    @property
    def answered(self) -> tuple[str, ...]:
        """The parties that are in the sum, in their order."""
        return tuple(name for name in self.exchange.names if name in self.masked)

    @property
    def is_enough(self) -> bool:
        """Whether as many parties have answered as the sum needs to be opened."""
        return len(self.masked) >= self.exchange.threshold

    @property
    def is_open(self) -> bool:
        """Whether there are enough shares of every party's masks; a row of zeros is a box that is damaged."""
        width = len(next(iter(self.openings.values()), b"")) // len(self.masked) if self.masked else 0
        return width > 0 and all(
            sum(any(found[at * width : (at + 1) * width]) for found in self.openings.values())
            >= self.exchange.threshold
            for at in range(len(self.masked))
        )

    def add(self, party: str, masked: Masked, members: Sequence[str]) -> None:
        """Add the answer of a party to the sum, that of these clients.

        Raises:
            SecureError: it has another form; nothing is added.
        """
        self._check_once(party, self.masked)
        check_masked(masked, self.exchange, party)
        self.words += unpack(masked.packed, len(self.words))
        self.masked[party] = replace(masked, packed=b"")
        self.members += members

    def question(self, holders: Sequence[str]) -> Unmasking | None:
        """Return what those of `holders` that are in the sum are asked in the second exchange, if any are."""
        places = {holder: self.exchange.names.index(holder) for holder in holders if holder in self.masked}
        if not places:
            return None
        dealt = [self.masked[dealer] for dealer in self.answered]
        return Unmasking(
            label=self.exchange.label,
            answered=self.answered,
            boxes={holder: tuple(one.boxes[at] for one in dealt) for holder, at in places.items()},
            commitments={
                holder: tuple(one.commitments[at] for one in dealt) for holder, at in places.items()
            },
        )

    def take_opening(self, holder: str, found: bytes) -> None:
        """Take the shares that a party opens; wrong ones are noted as its fault and not used."""
        try:
            self._check_once(holder, self.openings)
            commitments = {dealer: one.commitments for dealer, one in self.masked.items()}
            check_opening(found, holder, self.exchange, self.answered, commitments)
            self.openings[holder] = found
        except SecureError as error:
            self.faults[holder] = str(error)

    def opened(self, most_tokens: int) -> SecretSum:
        """Return what the sum says; a client learns from at most `most_tokens` tokens.

        Raises:
            TooFewPartiesError: fewer parties than it needs have answered, or opened shares.
            SecureError: the masks of a party do not open, or what is under them is no sum of honest vectors.
        """
        if not self.is_enough:
            raise TooFewPartiesError(
                f"{len(self.masked)} of {len(self.exchange.parties)} parties answered,"
                f" {self.exchange.threshold} are needed"
            )
        try:
            words = unmasked(self.exchange, self.words, self.answered, self.openings)
        except SecureError as error:
            if error.party:
                self.faults[error.party] = str(error)
            raise
        return read_honest(words, self.asked, most_tokens, self.noise)

    def _check_once(self, party: str, taken: Mapping[str, object]) -> None:
        if party not in self.clients or party in taken:
            raise SecureError(f"{party} is no party of the secret sum, or answered twice", party)


def read_honest(
    words: np.ndarray, asked: AskedSum, most_tokens: int, noise: SharedNoise | None = None
) -> SecretSum:
    """Return what the words of an opened sum say, in which every party has added its share of `noise`.

    Raises:
        SecureError: no sum of honest vectors has these words.
    """
    found = read_sum(words, asked.scale(most_tokens, noise))
    moved, largest = float(np.abs(found.mean).max()), asked.largest
    if noise is not None:
        largest += noise.largest(len(asked.exchange.parties)) * asked.weight_cap / found.weight
    if moved > ROUNDING * largest:
        raise SecureError(f"a value of the mean moved by {moved:.3g}, at most {largest:.3g} can be honest")
    return found
