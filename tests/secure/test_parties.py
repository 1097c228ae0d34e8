"""Who takes part: what a node refuses before it adds its vector, and groups of many parties."""

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import BadPartiesError, SecureError, TooFewPartiesError
from fedllm.identity import public_text, sign
from fedllm.secure.agreement import derived, public_of
from fedllm.secure.parties import Exchange, Party, check_parties, in_groups, party_statement, threshold_of
from tests.secure.secret_sums import key_of

SITES = [Ed25519PrivateKey.from_private_bytes(derived(b"test", "site", number)) for number in range(4)]
PEERS = [public_text(site) for site in SITES]


def party(number: int, site: int | None = None, run: str = "run") -> Party:
    """Return party `number` with a key that its site has signed."""
    key = SITES[number if site is None else site]
    name, public = f"site-{number}", public_of(key_of(number))
    return Party(name, public, public_text(key), sign(key, party_statement(run, "plan", name, public)))


PARTIES = tuple(map(party, range(4)))


def check(parties: tuple[Party, ...] = PARTIES, **changed: Any) -> None:
    """Check as party 0 of a site that names all four as its peers."""
    known = {"run": "run", "plan_digest": "plan", "min_parties": 3, "peers": PEERS} | changed
    check_parties(Exchange(bytes(32), parties), "site-0", public_of(key_of(0)), **known)


def test_parties_signed_by_peers_are_accepted() -> None:
    check()
    check(tuple(replace(each, identity="", signature=b"") for each in PARTIES), peers=None)


@pytest.mark.parametrize(
    "forged",
    [
        replace(PARTIES[2], run_key=public_of(key_of(9))),
        replace(PARTIES[2], signature=PARTIES[1].signature),
        replace(PARTIES[2], signature=b""),
        replace(PARTIES[2], identity=PEERS[1]),
        replace(PARTIES[2], identity="ed25519:"),
        party(2, run="another run"),
    ],
)
def test_a_forged_key_is_named(forged: Party) -> None:
    with pytest.raises(BadPartiesError, match="the key of party site-2 is not signed by a site") as caught:
        check((*PARTIES[:2], forged, PARTIES[3]))
    assert caught.value.party == "site-2"


def test_a_site_that_is_no_peer_is_named() -> None:
    with pytest.raises(BadPartiesError, match="site-3"):
        check(peers=PEERS[:3])


def test_a_doubled_party_is_named() -> None:
    for parties in ((*PARTIES[:2], *PARTIES[1:]), PARTIES[::-1]):
        with pytest.raises(BadPartiesError, match=r"party site-\d is doubled or out of order"):
            check(parties)
    with pytest.raises(BadPartiesError, match="two parties of the secret sum have one key"):
        check((*PARTIES, replace(PARTIES[3], name="site-4")))


def test_a_node_is_among_the_parties_with_its_own_key() -> None:
    for parties in (PARTIES[1:], (replace(PARTIES[0], run_key=public_of(key_of(7))), *PARTIES[1:])):
        with pytest.raises(BadPartiesError, match="do not hold site-0 with its own key"):
            check(parties)


def test_too_few_parties_are_refused() -> None:
    with pytest.raises(TooFewPartiesError, match="2 parties in the secret sum, and at least 3"):
        check(PARTIES[:2])
    with pytest.raises(TooFewPartiesError, match="2 parties in the secret sum, and at least 3"):
        check((*PARTIES[:2], party(2, site=1)))  # two clients of one site hide no third site


@pytest.mark.parametrize("changed", [{"label": b"short"}, {"parties": (replace(PARTIES[0], run_key=b"k"),)}])
def test_sizes_of_another_kind_are_refused(changed: dict[str, Any]) -> None:
    exchange = replace(Exchange(bytes(32), PARTIES), **changed)
    with pytest.raises(SecureError, match="another length"):
        check_parties(
            exchange, "site-0", public_of(key_of(0)), run="run", plan_digest="plan", min_parties=1, peers=None
        )


def test_two_thirds_must_answer_to_the_end() -> None:
    assert [threshold_of(number) for number in (1, 2, 3, 4, 5, 6, 7, 30, 100)] == [
        1,
        2,
        2,
        3,
        4,
        4,
        5,
        20,
        67,
    ]


def test_the_digest_binds_label_names_keys_and_terms() -> None:
    exchange = Exchange(bytes(32), PARTIES)
    others = [
        Exchange(bytes(31) + b"1", PARTIES),
        Exchange(bytes(32), PARTIES, terms=b"1"),
        Exchange(bytes(32), PARTIES[:3]),
        Exchange(bytes(32), (*PARTIES[:3], replace(PARTIES[3], name="x"))),
        Exchange(bytes(32), (*PARTIES[:3], replace(PARTIES[3], run_key=bytes(32)))),
    ]
    assert len({each.digest for each in [exchange, *others]}) == 6


@pytest.mark.parametrize("number", [100, 101, 129, 500])
def test_above_a_hundred_parties_are_in_groups(number: int) -> None:
    parties = [Party(f"{at:03d}", derived(b"key", at)) for at in range(number)]
    groups = in_groups(parties[::-1], bytes(32))
    sizes = [len(group.parties) for group in groups]
    assert (len(groups) == 1) == (number <= 100)
    assert max(sizes) - min(sizes) <= 1
    assert len(groups) == 1 or max(sizes) <= 64
    assert sorted(name for group in groups for name in group.names) == [each.name for each in parties]
    assert all(list(group.names) == sorted(group.names) for group in groups)
    assert len({group.label for group in groups}) == len(groups)
    again = in_groups(parties, b"1" * 32)
    assert [group.names for group in again] == [group.names for group in groups]
    assert {group.label for group in again}.isdisjoint(group.label for group in groups)
