"""What has left of one data set, over all runs and servers: one ledger, on its owner's machine.

A data set is the rows that a node was started with, known by the path they lie at. Every answer that noise of
its own protects is an entry, named by its run, round and bits, before it leaves; a new run or another server
finds what earlier ones have spent. Units are accounts: noise that hides a whole client hides each of its rows
too and is charged under both, while noise that hides a row says nothing of the client.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fedllm.errors import BudgetSpentError, CheckpointError
from fedllm.files import make_private_folder, write_file
from fedllm.privacy.accounting import Charge, epsilon_of, merged, quick_bound
from fedllm.privacy.ledger import Entry, Ledger, change_ledger, read_ledger

EXAMPLE, CLIENT = "example", "client"  # the units, and the accounts of a data set's ledger
_LEDGER, _PATH = "ledger.json", "data-set"
_ROUNDING = 1e-9  # noise is calibrated to meet a budget to about its last digit


@dataclass(frozen=True, kw_only=True)
class DataBudget:
    """A data set's ledger and what its owner allows: `epsilon` at `delta` for a `unit`; 0 = no limit."""

    folder: Path
    epsilon: float = 0.0
    delta: float = 1e-5
    unit: str = EXAMPLE

    @property
    def ledger(self) -> Ledger:
        """What has left so far.

        Raises:
            CheckpointError: the file is damaged.
        """
        return read_ledger(self.folder / _LEDGER)

    @property
    def data_set(self) -> str:
        """The path that names the data set, "" before its first charge."""
        file = self.folder / _PATH
        return file.read_text() if file.exists() else ""

    def check(self, ledger: Ledger, charge: Charge, unit: str) -> None:
        """Refuse a release of a run whose own unit is `unit` where it would exceed the limit.

        Raises:
            BudgetSpentError: it would.
        """
        if not self.epsilon:
            return
        spends = unit_charges(ledger, self.unit)
        if spends is not None and self.unit in accounts_of(unit):
            total, most = merged((*spends, charge)), self.epsilon * (1 + _ROUNDING)
            # The quick bound is enough until the budget is nearly spent.
            if quick_bound(total, self.delta) <= most or epsilon_of(total, self.delta) <= most:
                return
        raise BudgetSpentError(
            f"one more answer would exceed [budget] epsilon = {self.epsilon:g} of this data set, counted over"
            f" all runs in {self.folder / _LEDGER} (fedllm site budget); it sits out"
        )

    def pay(self, entry: Entry, unit: str, data: Path) -> None:
        """Record a release of a run whose unit is `unit`; it is on disk by then, and may leave.

        `entry` has one charge. The same release of the same run again is free.

        Raises:
            BudgetSpentError: it would exceed the limit.
            CheckpointError: it cannot be recorded.
        """
        (charge,) = entry.charges.values()
        charged = replace(entry, charges=dict.fromkeys(accounts_of(unit), charge))

        def change(ledger: Ledger) -> Ledger:
            after = ledger.with_entry(charged)
            if after is not ledger:
                self.check(ledger, charge, unit)
            return after

        _name(self.folder, data)
        change_ledger(self.folder / _LEDGER, change)


def accounts_of(unit: str) -> tuple[str, ...]:
    """Return the units under which a release of a run of `unit` counts."""
    return (EXAMPLE, CLIENT) if unit == CLIENT else (EXAMPLE,)


def unit_charges(ledger: Ledger, unit: str) -> tuple[Charge, ...] | None:
    """Return what was charged under a unit, None where something left that nothing bounds under it."""
    if any(unit not in entry.charges for entry in ledger.entries):
        return None
    return ledger.charges_of(unit)


def spent(ledger: Ledger, unit: str, delta: float) -> float:
    """Return the epsilon of all that has left, infinite where nothing bounds it under this unit."""
    charges = unit_charges(ledger, unit)
    return math.inf if charges is None else epsilon_of(charges, delta)


def budget_folder(state: Path, data: Path) -> Path:
    """Return where the ledger of a data set lies below a machine's state folder."""
    return state / "budget" / hashlib.sha256(str(data).encode()).hexdigest()[:32]


def budget_folders(state: Path) -> Iterator[Path]:
    """Yield the folder of every data set that has a ledger."""
    for file in sorted((state / "budget").glob(f"*/{_LEDGER}")):
        yield file.parent


def _name(folder: Path, data: Path) -> None:
    """Note which data set a folder is of, for the people who read it."""
    try:
        make_private_folder(folder)
        if not (folder / _PATH).exists():
            write_file(folder / _PATH, str(data))
    except OSError as error:
        raise CheckpointError(
            f"the privacy ledger of {data} cannot be kept in {folder}: {error.strerror}; let this user write"
            " there"
        ) from None
