"""Sums by additive shares: a blind relay passes them on, and no server sees an update or even the sum.

Every party splits its ring vector into as many shares as there are holders, three of the parties. All but one
are the streams of fresh seeds, the last is what then is missing to the vector; any two of them tell nothing.
Each is sealed for its holder. Holders add up the shares of the same parties and open their sums to all
parties, each of which adds the three and goes on alone with the total: the relay has seen only ciphertext.

One honest holder is enough. A party that is lost does not matter, since nobody's share depends on another's;
a lost holder costs the attempt. What is sealed is bound to the exchange with its terms, among them the
adapter that the parties hold, and to the holders: parties that were told different things cannot open each
other's boxes. A holder that opens different sums to different parties shows when the digests of their
adapters are compared (`apart`), or at the next exchange. It can bend the sum as any party can with its own
vector.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedllm.errors import BadPartiesError, SecureError, TooFewPartiesError
from fedllm.identity import statement
from fedllm.secure.agreement import (
    BOX_BYTES,
    KEY_BYTES,
    SEED_BYTES,
    add_mask,
    agreed,
    derived,
    open_box,
    seal,
)
from fedllm.secure.parties import Exchange
from fedllm.secure.ring import BITS, pack, packed_size, unpack

NUM_HOLDERS = 3


@dataclass(frozen=True)
class Relay:
    """An exchange with its `holders`, three of its parties.

    Raises:
        BadPartiesError: the holders are not three different parties of the exchange.
    """

    exchange: Exchange
    holders: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.holders) == len(set(self.holders) & set(self.exchange.names)) == NUM_HOLDERS:
            raise BadPartiesError(f"a secret sum needs {NUM_HOLDERS} different parties to hold its shares")

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of all that its parties must have been told alike."""
        told = [self.exchange.digest.hex(), list(self.holders)]
        return hashlib.sha256(statement("fedllm relay 1", {"told": told})).digest()

    def takes_vector(self, holder: str, sender: str) -> bool:
        """Return whether a holder gets the long share of a sender, not a seed: each does of every third."""
        return self.holders[self.exchange.names.index(sender) % NUM_HOLDERS] == holder

    def secret(self, private: bytes, other: str) -> bytes:
        """Return what the owner of a private run key and another party alone can compute for this relay."""
        party = self.exchange.parties[self.exchange.names.index(other)]
        return derived(agreed(private, party.run_key), "relay", self.digest)


@dataclass(frozen=True)
class Opening:
    """A holder's sum for all parties: `content` under a fresh key, and `boxes` with that key, one a party."""

    content: bytes
    boxes: Mapping[str, bytes]

    def to_bytes(self) -> bytes:
        """Return the boxes in the order of the parties, all of one length, and the content."""
        return b"".join([*self.boxes.values(), self.content])

    @classmethod
    def from_bytes(cls, data: bytes, relay: Relay) -> "Opening":
        """Return what `to_bytes` wrote; whether it opens is found when it is opened."""
        names, width = relay.exchange.names, KEY_BYTES + BOX_BYTES
        boxes = {name: data[width * place :][:width] for place, name in enumerate(names)}
        return cls(data[width * len(names) :], boxes)


def shared_bytes(size: int) -> int:
    """Return the bytes of the boxes that a party sends for a vector of `size` values."""
    return packed_size(size) + (NUM_HOLDERS - 1) * SEED_BYTES + NUM_HOLDERS * BOX_BYTES


def share(
    me: str, private: bytes, relay: Relay, words: np.ndarray, machine_secret: bytes
) -> dict[str, bytes]:
    """Return a box for each holder with its share of the ring words [N] of party `me`.

    Seeds follow from the machine's secret, the relay and the words: after a restart the same words give the
    same boxes, and other words unrelated ones.
    """
    vector = hashlib.sha256(pack(words)).digest()
    rest, contents = words.copy(), {}
    for holder in relay.holders:
        if not relay.takes_vector(holder, me):
            names = ("share", relay.digest, vector, me, holder)
            contents[holder] = derived(machine_secret, *names, length=SEED_BYTES)
            add_mask(rest, contents[holder], -1)
    return {
        holder: seal(
            relay.secret(private, holder), contents.get(holder) or pack(rest), _about("share", me, holder)
        )
        for holder in relay.holders
    }


def add_share(total: np.ndarray, me: str, private: bytes, relay: Relay, sender: str, box: bytes) -> None:
    """Add to `total` [N] (uint32), in place, the share that a sender has sealed for holder `me`.

    Raises:
        SecureError: the box does not open, or holds something else; it names the sender, and `total` is as it
            was.
    """
    content = open_box(relay.secret(private, sender), box, _about("share", sender, me), sender)
    if relay.takes_vector(me, sender):
        total += _unpacked(content, len(total), sender)
    elif len(content) == SEED_BYTES:
        add_mask(total, content, 1)
    else:
        raise SecureError(f"the share of {sender} is no seed", sender)


def open_sum(
    me: str,
    private: bytes,
    relay: Relay,
    answered: Collection[str],
    total: np.ndarray,
    machine_secret: bytes,
) -> Opening:
    """Return the sum [N] of holder `me` over the parties that `answered`, for all parties of the relay.

    A holder opens one sum a label: of two, the difference would tell of the parties by which they differ.

    Raises:
        BadPartiesError: somebody answered who is no party.
        TooFewPartiesError: fewer answered than the threshold.
    """
    about = _list_about(relay, answered)
    packed = pack(total)
    names = ("opening", relay.digest, about, hashlib.sha256(packed).digest(), me)
    key = derived(machine_secret, *names, length=KEY_BYTES)
    boxes = {
        party: seal(relay.secret(private, party), key, _about("key", me, party) + about)
        for party in relay.exchange.names
    }
    return Opening(seal(key, packed, about), boxes)


def total_of(
    me: str,
    private: bytes,
    relay: Relay,
    answered: Collection[str],
    openings: Mapping[str, Opening],
    size: int,
) -> np.ndarray:
    """Return the ring words [size] of the sum over those who `answered`, as party `me` reads them.

    Raises:
        SecureError: an opening is missing, damaged, or of another list of parties; it names the holder.
    """
    about, total = _list_about(relay, answered), np.zeros(size, np.uint32)
    for holder in relay.holders:
        if holder not in openings or me not in openings[holder].boxes:
            raise SecureError(f"holder {holder} has not opened its sum", holder)
        box = openings[holder].boxes[me]
        key = open_box(relay.secret(private, holder), box, _about("key", holder, me) + about, holder)
        total += _unpacked(open_box(key, openings[holder].content, about, holder), size, holder)
    return total & np.uint32(2**BITS - 1)


def apart(digests: Mapping[str, str]) -> tuple[str, ...]:
    """Return the parties whose adapter is another than that of most, by the digests that they report.

    Where no adapter is that of more than half of them, these are all parties.
    """
    (most, number), *_ = Counter(digests.values()).most_common(1)
    is_agreed = 2 * number > len(digests)
    return tuple(party for party, digest in digests.items() if not is_agreed or digest != most)


def _list_about(relay: Relay, answered: Iterable[str]) -> bytes:
    """Return what names the parties of one sum, in whatever order they are listed."""
    names = set(answered)
    if not names <= set(relay.exchange.names):
        raise BadPartiesError("the relay counts somebody who is no party of the secret sum")
    if len(names) < relay.exchange.threshold:
        raise TooFewPartiesError(f"{len(names)} parties answered, and {relay.exchange.threshold} are needed")
    return hashlib.sha256(statement("fedllm relay list 1", {"parties": sorted(names)})).digest()


def _about(use: str, sender: str, receiver: str) -> bytes:
    return statement(f"fedllm relay {use} 1", {"from": sender, "to": receiver})


def _unpacked(content: bytes, size: int, party: str) -> np.ndarray:
    try:
        return unpack(content, size)
    except SecureError:
        raise SecureError(f"what {party} sent is no vector of {size:,} values", party) from None
