"""The methods of secret sums at the server: how the vectors of parties add up, and how their sum is opened.

A method is a kind of sum (`PartySum`) and its messages (`Method`); the round is the same for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.app import RecordDict

from fedllm.secure.parties import Exchange
from fedllm.secure.vector import NUM_NUMBERS, SecretSum
from fedllm.wire.encrypted import KeyHolder, add_key_holders, read_encrypted, write_decrypt
from fedllm.wire.masks import AskedSum, HiddenAnswer, read_masked, write_unmask
from strategies.secure.encrypted_sum import EncryptedSum
from strategies.secure.group_sum import GroupSum
from strategies.session import Session


class PartySum(Protocol):
    """The sum of one group of parties in one attempt at a round: see `GroupSum`."""

    asked: AskedSum
    clients: Mapping[str, tuple[str, ...]]
    members: list[str]
    openings: dict[str, bytes]
    faults: dict[str, str]

    @property
    def exchange(self) -> Exchange:
        """Its label and parties."""

    @property
    def answered(self) -> tuple[str, ...]:
        """The parties that are in the sum, in their order."""

    @property
    def is_enough(self) -> bool:
        """Whether those that have answered suffice for it to be opened."""

    @property
    def is_open(self) -> bool:
        """Whether what opens it is there."""

    def add(self, party: str, hidden: Any, members: Sequence[str]) -> None:
        """Add the answer of a party to the sum, that of these clients."""

    def question(self, holders: Sequence[str]) -> Any:
        """Return what those of a node's clients that can open the sum are asked, None where none can."""

    def take_opening(self, holder: str, found: bytes) -> None:
        """Take what a party opens; what is wrong is noted as its fault and not used."""

    def opened(self, most_tokens: int) -> SecretSum:
        """Return what the sum says; a client learns from at most `most_tokens` tokens."""


@dataclass(frozen=True)
class Method:
    """What a method does its own way.

    `new_sum` starts the sum of a group, with as many words as are given; `name_parties` adds to a request
    what its sums need besides the parties; `read` reads a node's answer, and `write_question` asks a node to
    open sums.
    """

    new_sum: Callable[[Session, int, AskedSum, Mapping[str, tuple[str, ...]], int], PartySum]
    name_parties: Callable[[RecordDict, Sequence[Any]], None]
    read: Callable[..., HiddenAnswer[Any]]
    write_question: Callable[..., RecordDict]


def _masked_sum(
    session: Session, attempt: int, asked: AskedSum, clients: Mapping[str, tuple[str, ...]], size: int
) -> GroupSum:
    noise = session.plan.shared_noise(num_values=size - NUM_NUMBERS, num_parties=len(asked.exchange.parties))
    return GroupSum(asked, clients, np.zeros(size, np.uint32), noise)


def _encrypted_sum(
    session: Session, attempt: int, asked: AskedSum, clients: Mapping[str, tuple[str, ...]], size: int
) -> EncryptedSum:
    # In turn, since an attempt fails where the key holder is lost.
    names = asked.exchange.names
    name = names[(attempt - 1) % len(names)]
    return EncryptedSum(asked, clients, size, KeyHolder(name, session.clients[name].public_key))


METHODS: Mapping[str, Method] = {
    "masks": Method(_masked_sum, lambda content, sums: None, read_masked, write_unmask),
    "he": Method(
        _encrypted_sum,
        lambda content, sums: add_key_holders(content, [one.key_holder for one in sums]),
        read_encrypted,
        write_decrypt,
    ),
}
