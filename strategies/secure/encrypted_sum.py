"""One secret sum of ciphertexts as the server sees it: it adds them up, and one of the parties decrypts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.errors import SecureError, TooFewPartiesError
from fedllm.secure.homomorphic import CipherSum
from fedllm.secure.parties import Exchange
from fedllm.secure.ring import packed_size, unpack
from fedllm.secure.vector import SecretSum
from fedllm.wire.encrypted import Decrypting, KeyHolder
from fedllm.wire.masks import AskedSum
from strategies.secure.group_sum import read_honest


@dataclass(eq=False)
class EncryptedSum:
    """The sum of one group of parties in one attempt at a round; `key_holder` is the party that decrypts it.

    Of all ciphertexts only their sum is kept. Fields are as in `strategies.secure.group_sum.GroupSum`.
    """

    asked: AskedSum
    clients: Mapping[str, tuple[str, ...]]
    size: int
    key_holder: KeyHolder
    members: list[str] = field(default_factory=list)
    openings: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    _added: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._total = CipherSum(self.size)

    @property
    def exchange(self) -> Exchange:
        """Its label and parties."""
        return self.asked.exchange

    @property
    def answered(self) -> tuple[str, ...]:
        """The parties that are in the sum, in their order."""
        return tuple(name for name in self.exchange.names if name in self._added)

    @property
    def is_enough(self) -> bool:
        """Whether as many parties have answered as the sum must hide one among, and the key holder has."""
        return len(self._added) >= self.exchange.threshold and self.key_holder.name in self._added

    @property
    def is_open(self) -> bool:
        """Whether the key holder has decrypted it."""
        return bool(self.openings)

    def add(self, party: str, content: bytes, members: Sequence[str]) -> None:
        """Add the answer of a party to the sum, that of these clients.

        Raises:
            SecureError: it has another form; nothing is added.
        """
        if party not in self.clients or party in self._added:
            raise SecureError(f"{party} is no party of the secret sum, or answered twice", party)
        self._total.add(content, party)
        self._added.add(party)
        self.members += members

    def question(self, holders: Sequence[str]) -> Decrypting | None:
        """Return what the key holder is asked in the second exchange, None where it is none of `holders`."""
        if self.key_holder.name not in holders:
            return None
        return Decrypting(
            label=self.exchange.label,
            key_holder=self.key_holder.name,
            answered=self.answered,
            content=self._total.content(),
        )

    def take_opening(self, holder: str, found: bytes) -> None:
        """Take the words that the key holder decrypts; what is no sum of this size is noted as its fault."""
        if holder != self.key_holder.name or holder in self.openings:
            return
        if len(found) == packed_size(self.size):
            self.openings[holder] = found
        else:
            self.faults[holder] = f"what {holder} decrypted is no vector of {self.size:,} values"

    def opened(self, most_tokens: int) -> SecretSum:
        """Return what the sum says; a client learns from at most `most_tokens` tokens.

        Raises:
            TooFewPartiesError: fewer parties than it needs have answered, or the key holder has not.
            SecureError: it is not decrypted, or is no sum of honest vectors.
        """
        if not self.is_enough:
            raise TooFewPartiesError(
                f"{len(self._added)} of {len(self.exchange.parties)} parties answered, and their sum is"
                f" decrypted from {self.exchange.threshold} on, if the key holder {self.key_holder.name} is"
                " among them"
            )
        if not self.is_open:
            raise SecureError(f"the key holder {self.key_holder.name} has not decrypted it")
        words = unpack(self.openings[self.key_holder.name], self.size)
        return read_honest(words, self.asked, most_tokens)
