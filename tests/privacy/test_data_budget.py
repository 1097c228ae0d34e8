"""The ledger of a data set: every run and server of it, each unit, and the owner's limit."""

import math
import multiprocessing
from pathlib import Path

import pytest

from fedllm.errors import BudgetSpentError, CheckpointError
from fedllm.privacy.accounting import Charge, epsilon_of
from fedllm.privacy.data_budget import DataBudget, budget_folder, budget_folders, spent
from fedllm.privacy.ledger import Entry, Ledger

DELTA = 1e-5
DATA = Path("/private/rows.jsonl")
CHARGE = Charge(2.0, 1.0, 1)
NUM_CHARGES = 40


def entry(number: int, run: str = "one", charge: Charge = CHARGE) -> Entry:
    return Entry(number, 0, f"bits {number}", {"anna": charge}, run=run)


def budget(tmp_path: Path, **limits: float | str) -> DataBudget:
    return DataBudget(folder=budget_folder(tmp_path, DATA), **limits)  # type: ignore[arg-type]


def fits(number: int) -> float:
    """Return the budget that just so many releases meet."""
    return epsilon_of([Charge(2.0, 1.0, number)], DELTA)


def test_a_new_run_starts_no_new_budget(tmp_path: Path) -> None:
    for number in range(3):
        budget(tmp_path, epsilon=fits(3)).pay(entry(1, run=f"run {number}"), "example", DATA)
    with pytest.raises(BudgetSpentError, match=r"\[budget\] epsilon = .* counted over all runs"):
        budget(tmp_path, epsilon=fits(3)).pay(entry(1, run="another"), "example", DATA)
    budget(tmp_path, epsilon=fits(3)).pay(entry(1, run="run 1"), "example", DATA)  # the same bits again
    kept = budget(tmp_path)
    assert len(kept.ledger.entries) == 3
    assert spent(kept.ledger, "example", DELTA) == fits(3)
    assert kept.data_set == str(DATA)
    assert list(budget_folders(tmp_path)) == [kept.folder]


def test_another_data_set_has_a_budget_of_its_own(tmp_path: Path) -> None:
    budget(tmp_path, epsilon=fits(1)).pay(entry(1), "example", DATA)
    other = Path("/private/others.jsonl")
    DataBudget(folder=budget_folder(tmp_path, other), epsilon=fits(1)).pay(entry(1), "example", other)
    assert len(list(budget_folders(tmp_path))) == 2


def test_what_hides_a_client_is_charged_for_its_rows_too(tmp_path: Path) -> None:
    one = budget(tmp_path)
    one.pay(entry(1), "client", DATA)
    assert [spent(one.ledger, unit, DELTA) for unit in ("example", "client")] == [fits(1)] * 2
    one.pay(entry(2), "example", DATA)
    assert spent(one.ledger, "example", DELTA) == fits(2)
    assert spent(one.ledger, "client", DELTA) == math.inf


@pytest.mark.parametrize("unit", ["example", "client"])
def test_what_hides_rows_alone_fits_no_budget_of_a_client(unit: str, tmp_path: Path) -> None:
    one = budget(tmp_path, epsilon=1e6, unit="client")
    with pytest.raises(BudgetSpentError):
        one.pay(entry(1), "example", DATA)
    one.pay(entry(1), "client", DATA)
    budget(tmp_path).pay(entry(2), "example", DATA)  # while the owner had set no limit
    with pytest.raises(BudgetSpentError):
        one.pay(entry(3), unit, DATA)


def test_charges_of_other_noise_and_sampling_add_up(tmp_path: Path) -> None:
    charges = [Charge(1.1, 0.1, 30), Charge(3.0, 1.0, 1), Charge(1.1, 0.1, 30)]
    limit = epsilon_of(charges, DELTA)
    one = budget(tmp_path, epsilon=limit)
    for number, charge in enumerate(charges):
        one.pay(entry(number, charge=charge), "example", DATA)
    assert spent(one.ledger, "example", DELTA) == limit
    with pytest.raises(BudgetSpentError):
        one.pay(entry(9, charge=Charge(20.0, 1.0, 1)), "example", DATA)


def pay_many(folder: Path, run: str) -> None:
    """Charge as a process of its own."""
    for number in range(NUM_CHARGES):
        DataBudget(folder=folder, epsilon=1e6).pay(entry(number, run), "example", DATA)


def test_of_two_processes_every_charge_is_kept(tmp_path: Path) -> None:
    folder = budget_folder(tmp_path, DATA)
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=pay_many, args=(folder, run)) for run in ("one", "two")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    ledger = DataBudget(folder=folder).ledger
    assert len(ledger.entries) == 2 * NUM_CHARGES
    assert ledger.charges_of("example") == (Charge(2.0, 1.0, 2 * NUM_CHARGES),)


def test_a_ledger_that_is_damaged_or_cannot_be_kept_lets_nothing_leave(tmp_path: Path) -> None:
    one = budget(tmp_path)
    one.pay(entry(1), "example", DATA)
    (one.folder / "ledger.json").write_text("[{}]")
    with pytest.raises(CheckpointError, match="is damaged"):
        one.pay(entry(2), "example", DATA)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be kept"):
        DataBudget(folder=tmp_path / "file" / "x").pay(entry(1), "example", DATA)


def test_the_ledger_is_for_its_owner_alone(tmp_path: Path) -> None:
    budget(tmp_path / "state").pay(entry(1), "example", DATA)
    found = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert [path for path in found if path.is_dir() and path.stat().st_mode & 0o077] == []
    assert spent(Ledger(), "example", DELTA) == 0
