"""The ledger on disk: whole, and forgetting nothing that anybody charged."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedllm.errors import BudgetSpentError, CheckpointError
from fedllm.privacy.accounting import Charge
from fedllm.privacy.ledger import (
    Entry,
    Ledger,
    change_ledger,
    ledger_from_dict,
    ledger_to_dict,
    read_ledger,
)

NUM_WRITERS, NUM_CHARGES = 4, 15


def entry(number: int, release: str = "", draw: str = "") -> Entry:
    return Entry(number, 0, release, {"anna": Charge(2.0, 0.5, 3)}, draw)


def test_charges_of_several_writers_all_stay(tmp_path: Path) -> None:
    file = tmp_path / "anna" / "ledger.json"

    def write(writer: int) -> None:
        for number in range(NUM_CHARGES):
            change_ledger(file, lambda ledger, n=number: ledger.with_entry(entry(n, f"of {writer}")))  # type: ignore[misc]

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(write, range(NUM_WRITERS)))
    assert len(read_ledger(file).entries) == NUM_WRITERS * NUM_CHARGES


def test_a_refused_charge_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "ledger.json"
    kept = change_ledger(file, lambda ledger: ledger.with_entry(entry(1, draw="coins")))
    assert read_ledger(file) == kept == Ledger((entry(1, draw="coins"),))

    def refuse(ledger: Ledger) -> Ledger:
        raise BudgetSpentError

    with pytest.raises(BudgetSpentError):
        change_ledger(file, refuse)
    assert read_ledger(file) == kept
    assert change_ledger(file, lambda ledger: ledger) == kept  # and the lock is free again


def test_what_cannot_be_kept_or_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        change_ledger(tmp_path / "file" / "ledger.json", lambda ledger: ledger)
    (tmp_path / "ledger.json").write_text("[{}]")
    with pytest.raises(CheckpointError, match="is damaged"):
        change_ledger(tmp_path / "ledger.json", lambda ledger: ledger)


def asked(**bits: str) -> Entry:
    """Return the entry of a request by what came of each account, "" for nothing."""
    charges = dict.fromkeys(bits, Charge(2.0, 0.5, 3))
    return Entry(1, 1, "request", charges, answers={name: came for name, came in bits.items() if came})


def counts(ledger: Ledger) -> dict[str, int]:
    return {account: charge.count // 3 for account, (charge,) in ledger.accounts.items()}


def test_who_answers_one_request_with_other_bits_pays_again() -> None:
    first = Ledger().with_entry(asked(anna="x", ben="y", cleo=""))
    assert first.with_entry(asked(anna="x", ben="y")) is first
    second = first.with_entry(asked(anna="x", ben="z", cleo="w"))
    assert counts(second) == {"anna": 1, "ben": 2, "cleo": 1}  # of cleo nothing had come
    assert second.with_entry(asked(anna="x", ben="z", cleo="w")) is second
    assert second.with_entry(asked(ben="y")) is second
    assert counts(second.with_entry(asked(ben="v", cleo="u"))) == {"anna": 1, "ben": 3, "cleo": 2}
    assert ledger_from_dict(ledger_to_dict(second)) == second
    assert first.with_all(second) == second
