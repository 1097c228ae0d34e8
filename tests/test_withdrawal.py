"""The signed record of a withdrawal: what it covers, and that no other bytes pass for it."""

import json
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import IntegrityError
from fedllm.identity import public_text
from fedllm.withdrawal import MOST_BYTES, Withdrawal, read_withdrawal, sign_withdrawal

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
TIME = "2026-11-27T18:00:00+00:00"
SITE = public_text(KEY)


def test_a_record_says_who_has_withdrawn_whom() -> None:
    found = read_withdrawal(sign_withdrawal(KEY, ["ben", "anna"], TIME))
    assert found == Withdrawal(SITE, ("anna", "ben"), TIME)
    assert [found.covers(SITE, name) for name in ("anna", "cleo")] == [True, False]
    assert not found.covers(public_text(OTHER), "anna")
    assert read_withdrawal(sign_withdrawal(KEY, [], TIME)).covers(SITE, "cleo")


def test_one_changed_byte_anywhere_is_refused() -> None:
    record = sign_withdrawal(KEY, ["anna"], TIME)
    meant = json.loads(record)
    for place in range(len(record)):
        changed = record[:place] + bytes([record[place] ^ 1]) + record[place + 1 :]
        with suppress(ValueError):
            assert json.loads(changed) != meant
        with pytest.raises(IntegrityError, match="withdrawal that"):
            read_withdrawal(changed)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"withdrawal": {"site": "x"}, "signature": ""}',
        b"[" * 9000,
        sign_withdrawal(KEY, ["anna"], TIME) + b" " * MOST_BYTES,
        sign_withdrawal(KEY, ["\x1b[2J"], TIME),
        sign_withdrawal(KEY, ["anna"], "soon"),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        read_withdrawal(content)
    assert "\n" not in str(caught.value)
