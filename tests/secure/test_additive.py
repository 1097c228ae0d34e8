from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chisquare

from fedllm.errors import BadPartiesError, SecureError, TooFewPartiesError
from fedllm.secure.additive import NUM_HOLDERS, Opening, Relay, add_share, apart, open_sum, share, total_of
from fedllm.secure.agreement import new_key, public_of
from fedllm.secure.parties import Exchange, Party

BITS, SIZE = 24, 1000
NAMES = ("ann", "bob", "cem", "dan", "eve")
KEYS = {name: new_key() for name in NAMES}
SECRETS = {name: name.encode() * 10 for name in NAMES}
EXCHANGE = Exchange(b"l" * 32, tuple(Party(name, public_of(KEYS[name])) for name in NAMES))
RELAY = Relay(EXCHANGE, ("ann", "bob", "eve"))


def _words(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**BITS, SIZE).astype(np.uint32)


WORDS = {name: _words(number) for number, name in enumerate(NAMES)}


def _boxes(relay: Relay = RELAY) -> dict[str, dict[str, bytes]]:
    return {name: share(name, KEYS[name], relay, WORDS[name], SECRETS[name]) for name in NAMES}


def _held(holder: str, senders: Iterable[str], relay: Relay = RELAY) -> np.ndarray:
    total, boxes = np.zeros(SIZE, np.uint32), _boxes(relay)
    for sender in senders:
        add_share(total, holder, KEYS[holder], relay, sender, boxes[sender][holder])
    return total


def _opened(answered: Sequence[str], relay: Relay = RELAY) -> dict[str, Opening]:
    return {
        holder: open_sum(
            holder, KEYS[holder], relay, answered, _held(holder, answered, relay), SECRETS[holder]
        )
        for holder in relay.holders
    }


def _ring_sum(names: Iterable[str]) -> np.ndarray:
    return sum((WORDS[name] for name in names), start=np.zeros(SIZE, np.uint32)) % np.uint32(2**BITS)


@pytest.mark.parametrize("number", [4, 5])  # the threshold of five parties, and all
def test_every_party_reads_the_plain_ring_sum(number: int) -> None:
    for answered in combinations(NAMES, number):
        openings = _opened(answered)
        for name in NAMES:  # one that was lost reads it too
            total = total_of(name, KEYS[name], RELAY, answered, openings, SIZE)
            assert np.array_equal(total, _ring_sum(answered))


def test_an_opening_travels_as_bytes() -> None:
    for opening in _opened(NAMES).values():
        assert Opening.from_bytes(opening.to_bytes(), RELAY) == opening


def test_any_holders_may_be_chosen() -> None:
    for holders in combinations(NAMES, NUM_HOLDERS):
        relay = replace(RELAY, holders=holders)
        total = total_of("dan", KEYS["dan"], relay, NAMES, _opened(NAMES, relay), SIZE)
        assert np.array_equal(total, _ring_sum(NAMES))


def test_two_of_three_holders_see_uniform_words() -> None:
    """Whatever a party's vector, here zeros, the words that two holders have of it are even."""
    size = 60_000
    for sender in NAMES[:NUM_HOLDERS]:  # its long share goes to another holder each
        boxes = share(sender, KEYS[sender], RELAY, np.zeros(size, np.uint32), b"s" * 32)
        shares = {}
        for holder in RELAY.holders:
            shares[holder] = np.zeros(size, np.uint32)
            add_share(shares[holder], holder, KEYS[holder], RELAY, sender, boxes[holder])
        assert not (sum(shares.values()) % np.uint32(2**BITS)).any()
        for one, other in combinations(RELAY.holders, 2):
            both = (shares[one] + shares[other], shares[one] - shares[other])
            for seen in (shares[one], shares[other], *both):
                for byte in range(3):
                    counts = np.bincount(seen >> np.uint32(8 * byte) & np.uint32(255), minlength=256)
                    assert chisquare(counts).pvalue > 1e-6


def test_relay_sees_neither_words_nor_their_sum() -> None:
    openings, boxes = _opened(NAMES), _boxes()
    seen = b"".join(
        [*(box for each in boxes.values() for box in each.values()), *(o.content for o in openings.values())]
    )
    for words in (*WORDS.values(), _ring_sum(NAMES), *(_held(h, NAMES) for h in RELAY.holders)):
        three = (words[:3] & np.uint32(2**BITS - 1)).astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
        assert three.tobytes() not in seen


def test_same_words_give_the_same_boxes_and_others_new_seeds() -> None:
    first = share("ann", KEYS["ann"], RELAY, WORDS["ann"], SECRETS["ann"])
    assert share("ann", KEYS["ann"], RELAY, WORDS["ann"], SECRETS["ann"]) == first
    for other in (
        share("ann", KEYS["ann"], RELAY, WORDS["bob"], SECRETS["ann"]),
        share("ann", KEYS["ann"], RELAY, WORDS["ann"], SECRETS["bob"]),
        share("ann", KEYS["ann"], _relabelled(), WORDS["ann"], SECRETS["ann"]),
    ):
        assert not set(other.values()) & set(first.values())


def _relabelled() -> Relay:
    return replace(RELAY, exchange=replace(EXCHANGE, label=b"m" * 32))


@pytest.mark.parametrize(
    "relay",
    [
        _relabelled(),
        replace(RELAY, exchange=replace(EXCHANGE, terms=b"another adapter")),
        replace(RELAY, holders=("bob", "ann", "eve")),
    ],
    ids=["label", "terms", "holders"],
)
def test_parties_told_different_things_open_no_box(relay: Relay) -> None:
    box = share("dan", KEYS["dan"], relay, WORDS["dan"], SECRETS["dan"])["ann"]
    with pytest.raises(SecureError, match="dan") as refused:
        add_share(np.zeros(SIZE, np.uint32), "ann", KEYS["ann"], RELAY, "dan", box)
    assert refused.value.party == "dan"


def test_a_box_of_another_party_or_holder_does_not_open() -> None:
    boxes, total = _boxes(), np.zeros(SIZE, np.uint32)
    for sender, box in (("dan", boxes["cem"]["ann"]), ("dan", boxes["dan"]["bob"]), ("dan", b"")):
        with pytest.raises(SecureError, match="dan"):
            add_share(total, "ann", KEYS["ann"], RELAY, sender, box)
    assert not total.any()


def test_a_share_of_another_size_is_refused_and_named() -> None:
    for sender in NAMES[:NUM_HOLDERS]:
        boxes = share(sender, KEYS[sender], RELAY, _words(9)[:-1], SECRETS[sender])
        holder = next(name for name in RELAY.holders if RELAY.takes_vector(name, sender))
        with pytest.raises(SecureError, match=sender):
            add_share(np.zeros(SIZE, np.uint32), holder, KEYS[holder], RELAY, sender, boxes[holder])


def test_holders_that_were_given_different_lists_are_named() -> None:
    openings = {**_opened(NAMES), "eve": _opened(NAMES[1:])["eve"]}
    with pytest.raises(SecureError, match="eve"):
        total_of("dan", KEYS["dan"], RELAY, NAMES, openings, SIZE)


def test_a_missing_or_altered_opening_is_named() -> None:
    openings = _opened(NAMES)
    for spoilt in (
        {name: opening for name, opening in openings.items() if name != "bob"},
        {**openings, "bob": replace(openings["bob"], boxes={})},
        {**openings, "bob": replace(openings["bob"], content=openings["eve"].content)},
        {**openings, "bob": replace(openings["bob"], content=openings["bob"].content[:-1])},
    ):
        with pytest.raises(SecureError, match="bob"):
            total_of("dan", KEYS["dan"], RELAY, NAMES, spoilt, SIZE)


def test_a_holder_that_lies_to_one_party_shows_in_digests() -> None:
    honest = _opened(NAMES)
    wrong = _held("eve", NAMES) + np.uint32(1)
    lie = {**honest, "eve": open_sum("eve", KEYS["eve"], RELAY, NAMES, wrong, SECRETS["eve"])}
    digests = {}
    for name in NAMES:
        told = lie if name == "cem" else honest
        digests[name] = total_of(name, KEYS[name], RELAY, NAMES, told, SIZE).tobytes().hex()
    assert apart(digests) == ("cem",)


def test_parties_that_agree_on_nothing_are_all_apart() -> None:
    assert apart({"ann": "1", "bob": "1", "cem": "1"}) == ()
    assert apart({"ann": "1", "bob": "2"}) == ("ann", "bob")


def test_too_few_or_strange_parties_are_not_summed() -> None:
    total = _held("ann", NAMES[:3])
    with pytest.raises(TooFewPartiesError):
        open_sum("ann", KEYS["ann"], RELAY, NAMES[:3], total, SECRETS["ann"])
    with pytest.raises(BadPartiesError):
        open_sum("ann", KEYS["ann"], RELAY, (*NAMES, "zoe"), total, SECRETS["ann"])


@pytest.mark.parametrize("holders", [("ann", "bob"), ("ann", "bob", "bob"), ("ann", "bob", "zoe"), NAMES[:4]])
def test_holders_are_three_different_parties(holders: tuple[str, ...]) -> None:
    with pytest.raises(BadPartiesError):
        replace(RELAY, holders=holders)
