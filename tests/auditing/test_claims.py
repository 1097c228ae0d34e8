"""What a privacy statement claims of one coin of one canary."""

import math

import pytest

from scripts.auditing.canaries import Claim, claim_of

EXAMPLE = {"unit": "example", "trust": "local", "epsilon": 2.0, "delta": 1e-6}


def test_a_row_that_stands_once_is_the_unit_and_copies_are_more() -> None:
    assert claim_of(EXAMPLE, 1) == Claim(2.0, 1e-6)
    assert claim_of(EXAMPLE, 4) is None


def test_a_coin_replaces_what_a_client_sends() -> None:
    assert claim_of({**EXAMPLE, "unit": "client"}, 16) == Claim(2.0, 1e-6)
    central = claim_of({**EXAMPLE, "unit": "client", "trust": "central"}, 16)
    assert central is not None
    assert central.epsilon == 4.0
    assert central.delta == pytest.approx(1e-6 * (1 + math.exp(2.0)))


def test_where_nothing_is_claimed_there_is_no_claim() -> None:
    assert claim_of({}, 1) is None
    assert claim_of({"unit": "client", "trust": "central", "epsilon": 50.0, "delta": 1e-5}, 1) is None
