"""Masked sums: equal to the plain sum whoever is lost, and every wrong message named."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedllm.errors import SecureError, TooFewPartiesError
from fedllm.secure.agreement import add_mask, derived
from fedllm.secure.masking import check_masked, check_opening, mask, unmasked
from fedllm.secure.parties import Exchange, label_of, threshold_of
from fedllm.secure.ring import unpack
from fedllm.secure.shares import combine
from tests.secure.secret_sums import SIZE, SecretSum, exchange_of, key_of, secret_sum

FIVE = secret_sum(5)
NAMES = FIVE.exchange.names


def subsets(names: Collection[str], least: int) -> Iterator[tuple[str, ...]]:
    for number in range(least, len(names) + 1):
        yield from combinations(names, number)


def opened_seeds(found: SecretSum, dealer: str, answered: Collection[str]) -> list[bytes]:
    """Return what a server combines from the pieces of a dealer, be they shares or hashes."""
    number, at = len(found.exchange.names), sorted(answered).index(dealer)
    rows = {
        found.exchange.names.index(name) + 1: found.opening(name, answered)[16 * number * at :][: 16 * number]
        for name in answered
    }
    shares = {holder: np.frombuffer(row, np.uint8) for holder, row in rows.items()}
    seeds = combine(shares, found.exchange.threshold)
    return [seeds[begin : begin + 16] for begin in range(0, len(seeds), 16)]


# --- the sum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7])
def test_every_loss_in_both_exchanges_gives_the_plain_sum(number: int) -> None:
    found = secret_sum(number)
    threshold = threshold_of(number)
    for answered in subsets(found.exchange.names, threshold):
        openings = {name: found.opening(name, answered) for name in answered}
        for openers in subsets(answered, threshold):
            opened = {name: openings[name] for name in openers}
            total = unmasked(found.exchange, found.masked_sum(answered), answered, opened)
            assert np.array_equal(total, found.plain_sum(answered)), (answered, openers)


def test_thirty_parties_may_lose_ten() -> None:
    """With floor(2 n / 3) + 1 for a threshold they could not."""
    found = secret_sum(30)
    answered = found.exchange.names[3:23]
    assert np.array_equal(found.unmasked(answered, answered), found.plain_sum(answered))


@settings(deadline=None, max_examples=15)
@given(data=st.data(), number=st.integers(3, 7), seed=st.integers(0, 2**32))
def test_any_vectors_give_the_plain_sum(data: st.DataObject, number: int, seed: int) -> None:
    found = secret_sum(number, seed, exchange_of(number, attempt=seed))
    lost = data.draw(st.permutations(found.exchange.names))[: number - threshold_of(number)]
    first = data.draw(st.integers(0, len(lost)))  # lost in the first exchange, the others in the second
    answered = [name for name in found.exchange.names if name not in lost[:first]]
    openers = [name for name in answered if name not in lost[first:]]
    assert np.array_equal(found.unmasked(answered, openers), found.plain_sum(answered))


@pytest.mark.parametrize("bits", [8, 17, 24, 32])
def test_a_ring_of_any_width_gives_the_plain_sum(bits: int) -> None:
    words = np.arange(SIZE, dtype=np.uint32) * 12345
    exchange = exchange_of(1)
    sent = mask("site-0", key_of(0), exchange, words, b"machine", bits)
    found = SecretSum(exchange, {"site-0": words}, {"site-0": sent}, FIVE.code)
    openings = {"site-0": found.opening("site-0", ["site-0"])}
    total = unmasked(exchange, unpack(sent.packed, SIZE, bits), ["site-0"], openings, bits)
    assert np.array_equal(total, words & np.uint32(2**bits - 1))


def test_fewer_than_the_threshold_open_nothing() -> None:
    with pytest.raises(TooFewPartiesError):
        FIVE.opening("site-0", NAMES[:3])
    with pytest.raises(TooFewPartiesError):
        FIVE.unmasked(NAMES, NAMES[:3])


def test_a_restarted_party_gives_the_same_answer() -> None:
    again = secret_sum(5)
    assert again.masked == FIVE.masked
    assert again.opening("site-1", NAMES[:4]) == FIVE.opening("site-1", NAMES[:4])


def test_every_part_of_a_label_gives_another_one() -> None:
    parts = {"run": "r", "plan_digest": "p", "round_number": 1, "attempt": 0, "fresh": bytes(16)}
    others = {"run": "s", "plan_digest": "q", "round_number": 2, "attempt": 1, "fresh": b"1" * 16}
    labels = {label_of(**(parts | {name: value})) for name, value in others.items()} | {label_of(**parts)}
    assert len(labels) == 6


# --- what the server sees -----------------------------------------------------------------------------------


def test_masked_words_are_uniform() -> None:
    words = np.zeros(1 << 16, np.uint32)  # the least random vector
    sent = mask("site-0", key_of(0), exchange_of(3), words, b"machine")
    octets = np.frombuffer(sent.packed, np.uint8)
    for place in range(3):  # the bytes of a word, each for itself
        assert stats.chisquare(np.bincount(octets[place::3], minlength=256)).pvalue > 1e-3


def test_inputs_of_equal_sum_look_alike_to_the_server() -> None:
    """All a server holds in the end: words without their own masks, here of one value modulo 4."""
    views = {}
    for inputs in ((1, 2, 3), (3, 3, 0)):
        seen = np.zeros((4, 4), np.int64)
        for attempt in range(120):
            exchange = exchange_of(3, attempt)
            vectors = dict(zip(exchange.names, (np.full(1, each, np.uint32) for each in inputs), strict=True))
            sent = {
                name: mask(name, key_of(at), exchange, vectors[name], derived(b"machine", at))
                for at, name in enumerate(exchange.names)
            }
            found = SecretSum(exchange, vectors, sent, FIVE.code)
            words = []
            for at, name in enumerate(exchange.names[:2]):  # the third follows from the sum
                left = found.words(name)
                add_mask(left, opened_seeds(found, name, exchange.names)[at], -1)
                words.append(int(left[0]) % 4)
            seen[words[0], words[1]] += 1
        views[inputs] = seen.ravel()
    assert stats.chi2_contingency(list(views.values())).pvalue > 1e-3
    assert all(stats.chisquare(view).pvalue > 1e-3 for view in views.values())


def test_messages_have_one_length_whatever_they_hold() -> None:
    other = secret_sum(5, seed=1)
    for name in NAMES:
        one, two = FIVE.masked[name], other.masked[name]
        assert one.packed != two.packed
        assert [*map(len, (one.packed, *one.boxes))] == [*map(len, (two.packed, *two.boxes))]
        assert len(FIVE.opening(name, NAMES)) == len(other.opening(name, NAMES)) == 5 * 5 * 16


def test_an_opening_shows_shares_of_what_stays_alone() -> None:
    """Every 16 bytes that one list hides are the hash of those that another list opens."""
    lost = "site-4"
    full, part = FIVE.opening("site-0", NAMES), FIVE.opening("site-0", NAMES[:4])
    for place, dealer in enumerate(NAMES[:4]):
        for other, name in enumerate(NAMES):
            begin = 16 * (5 * place + other)
            one, two = full[begin : begin + 16], part[begin : begin + 16]
            assert two == one if name != lost else hashlib.sha256(two).digest()[:16] == one, (dealer, name)


def test_two_vectors_under_one_label_give_away_their_difference() -> None:
    """Why a node keeps a ledger of labels: masks with the others are the same, own ones are opened."""
    first, second = secret_sum(3, seed=1), secret_sum(3, seed=2)
    left = []
    for found in (first, second):
        words = found.words("site-0")
        add_mask(words, opened_seeds(found, "site-0", found.exchange.names)[0], -1)
        left.append(words)
    difference = first.vectors["site-0"] - second.vectors["site-0"]
    assert np.array_equal((left[0] - left[1] - difference) % 2**24, np.zeros(SIZE))


def test_two_lists_under_one_label_give_away_a_vector() -> None:
    """Why a node opens one list only: together they open a party's own mask and those with all others."""
    found = secret_sum(3)
    everybody, without = found.exchange.names, found.exchange.names[1:]
    words = found.words("site-0")
    add_mask(words, opened_seeds(found, "site-0", everybody)[0], -1)
    for other in without:
        add_mask(words, opened_seeds(found, other, without)[0], -1)  # where site-0 counts as lost
    assert np.array_equal((words - found.vectors["site-0"]) % 2**24, np.zeros(SIZE))


# --- wrong messages -----------------------------------------------------------------------------------------


def test_a_wrong_share_names_its_holder() -> None:
    opened = FIVE.opening("site-2", NAMES)
    for begin in range(0, len(opened), 16):  # shares and hashes alike
        wrong = opened[:begin] + bytes([opened[begin] ^ 1]) + opened[begin + 1 :]
        with pytest.raises(SecureError, match=r"site-2 opened a wrong share of site-\d") as caught:
            check_opening(wrong, "site-2", FIVE.exchange, NAMES, FIVE.commitments)
        assert caught.value.party == "site-2"
    with pytest.raises(SecureError, match="site-2 have another size"):
        check_opening(opened[:-16], "site-2", FIVE.exchange, NAMES, FIVE.commitments)


def test_one_opening_cannot_stand_for_anothers() -> None:
    with pytest.raises(SecureError, match="site-1 opened a wrong share"):
        check_opening(FIVE.opening("site-2", NAMES), "site-1", FIVE.exchange, NAMES, FIVE.commitments)


def test_a_few_damaged_boxes_do_not_matter() -> None:
    openings = {name: FIVE.opening(name, NAMES) for name in NAMES}
    openings["site-3"] = FIVE.opening("site-3", NAMES, **{"site-1": FIVE.masked["site-1"].boxes[0]})
    check_opening(openings["site-3"], "site-3", FIVE.exchange, NAMES, FIVE.commitments)
    total = unmasked(FIVE.exchange, FIVE.masked_sum(NAMES), NAMES, openings)
    assert np.array_equal(total, FIVE.plain_sum(NAMES))


def test_too_many_damaged_boxes_name_their_dealer() -> None:
    openings = {name: FIVE.opening(name, NAMES) for name in NAMES}
    for name in NAMES[2:4]:
        openings[name] = FIVE.opening(name, NAMES, **{"site-1": bytes(108)})
    with pytest.raises(SecureError, match="the boxes of site-1 do not open at site-2, site-3") as caught:
        unmasked(FIVE.exchange, FIVE.masked_sum(NAMES), NAMES, openings)
    assert caught.value.party == ""  # two of five may be on one side, so neither is proven to lie
    openings["site-4"] = FIVE.opening("site-4", NAMES, **{"site-1": bytes(108)})
    with pytest.raises(SecureError, match="site-1 do not open at site-2, site-3, site-4") as caught:
        unmasked(FIVE.exchange, FIVE.masked_sum(NAMES), NAMES, openings)
    assert caught.value.party == "site-1"


def test_a_box_that_is_not_what_was_committed_stays_shut() -> None:
    other = secret_sum(5, seed=1)  # the same label and keys: its boxes open
    opened = FIVE.opening("site-0", NAMES, **{"site-1": other.masked["site-1"].boxes[0]})
    assert [opened[80:160] == bytes(80), opened[:80] == bytes(80)] == [True, False]


@pytest.mark.parametrize(
    "told", [exchange_of(4), replace(FIVE.exchange, terms=b"other")], ids=["another list", "other terms"]
)
def test_parties_that_were_told_otherwise_share_no_mask(told: Exchange) -> None:
    apart = secret_sum(len(told.parties), exchange=told).masked["site-0"]
    boxes = {"site-0": apart.boxes[1], "site-1": FIVE.masked["site-1"].boxes[1]}
    opened = FIVE.opening("site-1", NAMES, **boxes)
    assert [opened[:80] == bytes(80), opened[80:160] == bytes(80)] == [True, False]


def test_a_copied_key_copies_no_mask() -> None:
    """The top bit of a public key does not count, so site-2 can have the key of site-0 in other bytes."""
    parties = list(exchange_of(3).parties)
    same = parties[0].run_key[:-1] + bytes([parties[0].run_key[-1] ^ 0x80])
    exchange = replace(exchange_of(3), parties=(*parties[:2], replace(parties[2], run_key=same)))
    found = secret_sum(3, exchange=exchange)
    words = found.words("site-1") - found.vectors["site-1"]
    add_mask(words, opened_seeds(found, "site-1", ["site-0", "site-1"])[1], -1)
    assert (words % 2**24).any()  # else the masks with site-0 and site-2 would be one, with both signs


@pytest.mark.parametrize("answered", [[*NAMES[:4], "stranger"], NAMES[1:]])
def test_a_party_opens_no_sum_it_is_not_in(answered: list[str]) -> None:
    boxes = dict.fromkeys(answered, bytes(108))
    with pytest.raises(SecureError, match=r"stranger|site-0"):
        FIVE.code.opening("site-0", key_of(0), FIVE.exchange, answered, boxes, boxes)


@pytest.mark.parametrize("field", ["boxes", "commitments"])
@pytest.mark.parametrize("change", [lambda each: each[1:], lambda each: (each[0] + b"x", *each[1:])])
def test_messages_of_another_size_name_their_sender(field: str, change: object) -> None:
    sent = FIVE.masked["site-1"]
    check_masked(sent, FIVE.exchange, "site-1")
    with pytest.raises(SecureError, match="site-1") as caught:
        check_masked(replace(sent, **{field: change(getattr(sent, field))}), FIVE.exchange, "site-1")
    assert caught.value.party == "site-1"
