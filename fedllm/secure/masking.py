"""Masked sums that survive lost parties, in two exchanges.

After Bonawitz et al. 2017 (doi 10.1145/3133956.3133982), with shares of seeds in place of shares of keys.
Party j sends its vector plus masks. One comes from a seed that it alone knows, and one for each other party l
from a seed that both derive from their keys: j adds it and l subtracts it, so that it vanishes where both
answer. What stays once the answers are summed are the masks of their own, and those shared with parties that
were lost. So j shares all its seeds among all parties by Shamir's scheme, each party's shares in a box that
it alone opens, and the second exchange brings the shares of what stays.

    first exchange    j -> server        masked words, a box for each party h, a commitment to each box
    second exchange   server -> h        who answered, and for each of them, j, its box for h
                      h -> server        its shares of j's own mask and of j's masks with the lost parties

A party never opens a seed itself, though it knows those it has in common with lost parties. A server could
tell each party another list: told that l was lost, j would give away their mask at once. With shares that
takes a threshold t of parties that were told so, and each party opens shares for one list only. Of n parties,
with c on the server's side, a server then reads sums over at least t - c others where it tells all the same
list, and over at least 2 t - n - c + 1 where it lies (`tests/secure/test_lying_server.py`).
"""

import hashlib
import hmac
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.errors import SecureError, TooFewPartiesError
from fedllm.secure.agreement import (
    BOX_BYTES,
    SEED_BYTES,
    add_masks,
    agreed,
    derived,
    open_box,
    seal,
    secret_stream,
)
from fedllm.secure.parties import Exchange
from fedllm.secure.ring import BITS, pack, packed_size
from fedllm.secure.shares import combine, split

COMMITMENT_BYTES = 32


@dataclass(frozen=True)
class Masked:
    """What a party sends first: its vector under masks, a box for each party, and commitments.

    Boxes and commitments are in the order of the parties, its own among them.
    """

    packed: bytes
    boxes: tuple[bytes, ...]
    commitments: tuple[bytes, ...]


def mask(
    me: str, private: bytes, exchange: Exchange, words: np.ndarray, machine_secret: bytes, bits: int = BITS
) -> Masked:
    """Return a party's vector [n] (uint32) under its masks; `private` is the key of the run.

    All that is random follows from the machine's secret, the exchange and the vector, so a restarted party
    gives the same answer for the same vector. Two vectors under one label would give away their difference:
    the caller keeps a ledger of labels.

    Raises:
        SecureError: `me` is no party, or another's key is none.
    """
    place = _place(exchange, me)
    stream = secret_stream(machine_secret, "masking", exchange.digest, hashlib.sha256(words.data).digest())
    seeds, box_keys = [], []
    for other, party in enumerate(exchange.parties):
        common = agreed(private, party.run_key)
        pair = sorted((me, party.name))  # with names: who copies another's key does not copy its masks
        seed = derived(common, "mask", exchange.digest, *pair, length=SEED_BYTES)
        seeds.append(stream.bytes(SEED_BYTES) if other == place else seed)
        box_keys.append(derived(common, "box", exchange.digest, me, party.name))
    masked = words.copy()
    add_masks(masked, [(seed, _sign(place, other)) for other, seed in enumerate(seeds)])
    shares = split(b"".join(seeds), exchange.threshold, len(seeds), stream)
    boxes = tuple(seal(key, row.tobytes()) for key, row in zip(box_keys, shares, strict=True))
    commitments = tuple(_commitment([_hashed(piece) for piece in _pieces(row.tobytes())]) for row in shares)
    return Masked(pack(masked, bits), boxes, commitments)


def check_masked(masked: Masked, exchange: Exchange, sender: str) -> None:
    """Refuse boxes and commitments of another number or size than the exchange has.

    Raises:
        SecureError: names the sender.
    """
    number = len(exchange.parties)
    right_boxes = [SEED_BYTES * number + BOX_BYTES] * number
    right_commitments = [COMMITMENT_BYTES] * number
    if [*map(len, masked.boxes)] != right_boxes or [*map(len, masked.commitments)] != right_commitments:
        raise SecureError(f"the boxes or commitments of {sender} have another number or size", sender)


def opening(
    me: str,
    private: bytes,
    exchange: Exchange,
    answered: Collection[str],
    boxes: Mapping[str, bytes],
    commitments: Mapping[str, bytes],
) -> bytes:
    """Return a party's shares for the sum of those who `answered`; all other parties count as lost.

    The answer has one row for each dealer that answered, and in it 16 bytes for each party. Those for the
    dealer itself and for the lost parties are shares. The others are hashes of theirs, with which the
    commitment is checked. The row of a dealer whose box was damaged is zeros. `boxes` and `commitments` are,
    by dealer, those made for this party. The caller sees to it that one list only is opened under a label.

    Raises:
        TooFewPartiesError: fewer answered than the threshold.
        SecureError: an unknown party is said to have answered, this one to be lost, or a box is missing.
    """
    dealers = _checked_answers(exchange, answered)
    if me not in dealers or not set(dealers) <= set(boxes) & set(commitments):
        raise SecureError(f"{me} cannot open a sum that it is not in, or for which a box is missing", me)
    rows = []
    for dealer, is_open in _opened(exchange, dealers).items():
        party = exchange.parties[_place(exchange, dealer)]
        key = derived(agreed(private, party.run_key), "box", exchange.digest, dealer, me)
        try:
            pieces = _pieces(open_box(key, boxes[dealer], sender=dealer))
        except SecureError:  # the sum needs a threshold of openings, so a few damaged boxes do not matter
            pieces = []
        hashes = [_hashed(piece) for piece in pieces]
        # Shares that differ from the commitment would later be blamed on this party.
        if len(pieces) == len(exchange.parties) and _equal(_commitment(hashes), commitments[dealer]):
            rows += [piece if is_open[place] else hashes[place] for place, piece in enumerate(pieces)]
        else:
            rows.append(bytes(_row_bytes(exchange)))
    return b"".join(rows)


def check_opening(
    found: bytes,
    holder: str,
    exchange: Exchange,
    answered: Collection[str],
    commitments: Mapping[str, Sequence[bytes]],
) -> None:
    """Refuse an opening that is not what the dealers committed to, by each dealer's `Masked.commitments`.

    Raises:
        SecureError: names the holder.
    """
    dealers = _checked_answers(exchange, answered)
    place = _place(exchange, holder)
    if len(found) != _row_bytes(exchange) * len(dealers):
        raise SecureError(f"the opened shares of {holder} have another size", holder)
    opened = _opened(exchange, dealers)
    for dealer, row in _rows(found, exchange, dealers).items():
        hashes = [_hashed(piece) if opened[dealer][at] else piece for at, piece in enumerate(_pieces(row))]
        if not _equal(_commitment(hashes), commitments[dealer][place]):
            raise SecureError(f"{holder} opened a wrong share of {dealer}", holder)


def unmasked(
    exchange: Exchange,
    sum_words: np.ndarray,
    answered: Collection[str],
    openings: Mapping[str, bytes],
    bits: int = BITS,
) -> np.ndarray:
    """Return the sum [n] (uint32, below 2^bits) of the vectors of those who `answered`.

    `sum_words` are their masked vectors summed up, from which the masks are taken in place; `openings` are,
    by holder, those that `check_opening` passed.

    Raises:
        TooFewPartiesError: fewer than the threshold answered, or opened anything. SecureError: too many boxes
        of one dealer did not open, and the sum is lost; names it where that is certain.
    """
    dealers = _checked_answers(exchange, answered)
    if len(openings) < exchange.threshold:
        raise TooFewPartiesError(
            f"{len(openings)} parties opened shares, and {exchange.threshold} are needed"
        )
    rows = {holder: _rows(found, exchange, dealers) for holder, found in openings.items()}
    seeds = {dealer: _combined(exchange, dealer, rows) for dealer in dealers}
    left = [
        (seeds[dealer][other], -_sign(_place(exchange, dealer), other))
        for dealer, is_open in _opened(exchange, dealers).items()
        for other in range(len(exchange.parties))
        if is_open[other]
    ]
    add_masks(sum_words, left)
    return sum_words & np.uint32(2**bits - 1)


def sent_bytes(size: int, num_parties: int, bits: int = BITS) -> int:
    """Return the bytes that a party sends in both exchanges for a vector [size], if nobody is lost."""
    row = SEED_BYTES * num_parties
    return packed_size(size, bits) + num_parties * (row + BOX_BYTES + COMMITMENT_BYTES + row)


def plain_sum(vectors: Sequence[np.ndarray], bits: int = BITS) -> np.ndarray:
    """Return the sum [n] (uint32) of vectors that have no masks: what `unmasked` must give bit for bit."""
    total = np.zeros(len(vectors[0]), np.uint32)
    for words in vectors:
        total += words
    return total & np.uint32(2**bits - 1)


def _sign(place: int, other: int) -> int:
    """Return the sign of the mask that the party at `place` shares with `other`; its own is added."""
    return 1 if place <= other else -1


def _combined(exchange: Exchange, dealer: str, rows: Mapping[str, Mapping[str, bytes]]) -> list[bytes]:
    """Return a dealer's seeds, combined from its row at each holder; where hashes stood they mean nothing.

    Raises:
        SecureError: so many boxes of the dealer did not open that the sum is lost; names it where that is
        proven.
    """
    silent = [holder for holder, row in rows.items() if dealer not in row]
    if len(rows) - len(silent) < exchange.threshold:
        # So many that one of them must be honest, or else it is as likely that a single holder lies.
        is_proven = len(silent) >= 2 * exchange.threshold - len(exchange.parties)
        raise SecureError(
            f"the boxes of {dealer} do not open at {', '.join(silent)}: the sum is lost",
            dealer if is_proven else "",
        )
    shares = {
        _place(exchange, holder) + 1: np.frombuffer(row[dealer], np.uint8)
        for holder, row in rows.items()
        if dealer in row
    }
    return _pieces(combine(shares, exchange.threshold))


def _opened(exchange: Exchange, dealers: Sequence[str]) -> dict[str, list[bool]]:
    """Return which of each dealer's masks stay in the sum, by party: its own, and those with the lost."""
    lost = [name not in set(dealers) for name in exchange.names]
    return {
        dealer: [name == dealer or is_lost for name, is_lost in zip(exchange.names, lost, strict=True)]
        for dealer in dealers
    }


def _checked_answers(exchange: Exchange, answered: Collection[str]) -> tuple[str, ...]:
    """Return who answered in the order of the parties."""
    names = _checked_names(exchange, answered)
    if len(names) < exchange.threshold:
        raise TooFewPartiesError(f"{len(names)} parties answered, and {exchange.threshold} are needed")
    return names


def _checked_names(exchange: Exchange, named: Collection[str]) -> tuple[str, ...]:
    if unknown := sorted(set(named) - set(exchange.names)):
        raise SecureError(f"{unknown[0]} is no party of the secret sum", unknown[0])
    return tuple(name for name in exchange.names if name in set(named))


def _place(exchange: Exchange, name: str) -> int:
    _checked_names(exchange, [name])
    return exchange.names.index(name)


def _rows(found: bytes, exchange: Exchange, dealers: Sequence[str]) -> dict[str, bytes]:
    """Return the row of each dealer but those whose box did not open."""
    width = _row_bytes(exchange)
    rows = {dealer: found[at * width : (at + 1) * width] for at, dealer in enumerate(dealers)}
    return {dealer: row for dealer, row in rows.items() if row != bytes(width)}


def _row_bytes(exchange: Exchange) -> int:
    return SEED_BYTES * len(exchange.parties)


def _pieces(row: bytes) -> list[bytes]:
    return [row[begin : begin + SEED_BYTES] for begin in range(0, len(row), SEED_BYTES)]


def _hashed(piece: bytes) -> bytes:
    return hashlib.sha256(piece).digest()[:SEED_BYTES]


def _commitment(hashes: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(hashes)).digest()


def _equal(one: bytes, other: bytes) -> bool:
    return hmac.compare_digest(one, other)
