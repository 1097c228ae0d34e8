"""The privacy budget spent so far: one entry for every release, summed up for every account.

An account is a client, or the whole federation where all clients are charged alike. The ledger is written
before a release is used, so a run that was killed resumes with everything it has spent. An entry is named by
round, attempt and a digest of what was released: the same release made again after a resume is charged once,
while another attempt at the round, or other bits in it, is a second release.
"""

import fcntl
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from fedllm.errors import CheckpointError, FedLLMError
from fedllm.files import make_private_folder, write_file
from fedllm.privacy.accounting import Charge, epsilon_of, merged, quick_bound, renyi_check


@dataclass(frozen=True)
class Entry:
    """One release: the charge of every account that took part.

    `draw` names the coins that drew its rows, "" where there were none. Where accounts release something each
    and `release` names what they were asked for, `answers` has a digest of what came of each. `run` is named
    where one ledger counts several.
    """

    round_num: int
    attempt: int
    release: str
    charges: Mapping[str, Charge]
    draw: str = ""
    answers: Mapping[str, str] = field(default_factory=dict)
    run: str = ""

    @property
    def name(self) -> tuple[int, int, str, str]:
        """The release's identity: equal names are charged once."""
        return self.round_num, self.attempt, self.release, self.run


@dataclass(frozen=True)
class Ledger:
    """All releases so far, in order."""

    entries: tuple[Entry, ...] = ()

    def with_entry(self, entry: Entry) -> "Ledger":
        """Return the ledger with one more release.

        A release that is known already is not charged twice; only its accounts that were not charged are,
        and those of which other bits came than before.
        """
        known = next((known for known in self.entries if known.name == entry.name), None)
        if known is None:
            return Ledger((*self.entries, entry))
        ledger = self
        if not (
            entry.charges.keys() <= known.charges.keys() and entry.answers.keys() <= known.answers.keys()
        ):
            charges, answers = {**entry.charges, **known.charges}, {**entry.answers, **known.answers}
            wider = replace(known, charges=charges, answers=answers)
            ledger = Ledger(tuple(wider if one is known else one for one in self.entries))
        for account, bits in entry.answers.items():
            if known.answers.get(account, bits) != bits:  # a release of its own, named by itself
                apart = {account: entry.charges[account]}
                ledger = ledger.with_entry(Entry(entry.round_num, entry.attempt, bits, apart))
        return ledger

    def with_all(self, other: "Ledger") -> "Ledger":
        """Return the union with another ledger, in the order of rounds and attempts."""
        both = reduce(Ledger.with_entry, other.entries, self)
        return Ledger(tuple(sorted(both.entries, key=lambda entry: entry.name[:2])))

    @cached_property
    def accounts(self) -> dict[str, tuple[Charge, ...]]:
        """Everything each account was charged."""
        found: dict[str, list[Charge]] = {}
        for entry in self.entries:
            for account, charge in entry.charges.items():
                found.setdefault(account, []).append(charge)
        return {account: merged(charges) for account, charges in found.items()}

    def charges_of(self, account: str) -> tuple[Charge, ...]:
        """Return what an account was charged."""
        return self.accounts.get(account, ())

    @cached_property
    def distinct(self) -> set[tuple[Charge, ...]]:
        """The distinct sums of charges: most accounts have one in common, and each costs time to evaluate."""
        return set(self.accounts.values())

    def epsilon(self, delta: float) -> float:
        """Return the largest epsilon of any account, 0 where nothing was released."""
        # With sampling one evaluation takes a tenth of a second or more. In the order of their quick upper
        # bounds, the rest can be left out as soon as no bound is above what was found.
        bounds = {charges: quick_bound(charges, delta) for charges in self.distinct}
        largest = 0.0
        for charges in sorted(bounds, key=lambda charges: bounds[charges], reverse=True):
            if bounds[charges] <= largest:
                break
            largest = max(largest, epsilon_of(charges, delta))
        return largest

    def renyi_check(self, delta: float) -> float | None:
        """Return the largest epsilon by Renyi accounting, None where dp-accounting is not installed."""
        found = [renyi_check(charges, delta) for charges in self.distinct] or [0.0]
        return None if None in found else max(value for value in found if value is not None)

    def affords(self, account: str, charge: Charge, *, epsilon: float, delta: float, planned: int) -> bool:
        """Return whether an account may be charged once more within the budget.

        `planned` is the number of releases that the noise was calibrated for, 0 where it was given.
        """
        total = merged((*self.charges_of(account), charge))
        # Calibration has shown that so many fit; computing it again could differ in the last digit.
        if len(total) == 1 and total[0].count <= planned:
            return True
        return epsilon_of(total, delta) <= epsilon


def read_ledger(file: Path) -> Ledger:
    """Return the ledger in a file, empty where there is no file.

    Raises:
        CheckpointError: it is damaged. Starting afresh would forget what was spent.
    """
    try:
        return ledger_from_dict(json.loads(file.read_text())) if file.exists() else Ledger()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FedLLMError):
        raise CheckpointError(f"{file} is damaged; what was spent is not known: restore it") from None


def change_ledger(file: Path, change: Callable[[Ledger], Ledger]) -> Ledger:
    """Return what `change` makes of the ledger in a file, which holds it by then: whole or as it was.

    Whoever else changes it waits: of two that read and then write, one would forget what the other charged.

    Raises:
        CheckpointError: it is damaged or cannot be written; what `change` raises leaves it as it was.
    """
    try:
        make_private_folder(file.parent)
        # A file of its own, since a write replaces the ledger and with it what a lock on it would hold.
        with file.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, or with its process
            before = read_ledger(file)
            after = change(before)
            if after is not before:
                write_file(file, json.dumps(ledger_to_dict(after)) + "\n")
            return after
    except CheckpointError:  # it is an OSError too
        raise
    except OSError as error:
        raise CheckpointError(
            f"the privacy ledger {file} cannot be written: {error.strerror}; let this user write there"
        ) from None


def ledger_to_dict(ledger: Ledger) -> list[dict[str, Any]]:
    """Return a JSON-ready form; `ledger_from_dict` is its inverse."""
    return [
        {
            "round": entry.round_num,
            "attempt": entry.attempt,
            "release": entry.release,
            "draw": entry.draw,
            "answers": dict(entry.answers),
            "charges": {account: asdict(charge) for account, charge in entry.charges.items()},
            **({"run": entry.run} if entry.run else {}),
        }
        for entry in ledger.entries
    ]


def ledger_from_dict(values: Iterable[Mapping[str, Any]]) -> Ledger:
    """Return the ledger that `ledger_to_dict` wrote.

    Raises:
        KeyError, TypeError, ConfigError: it is no ledger.
    """
    return Ledger(
        tuple(
            Entry(
                int(item["round"]),
                int(item["attempt"]),
                str(item["release"]),
                {str(account): Charge(**charge) for account, charge in item["charges"].items()},
                str(item.get("draw", "")),
                {str(account): str(bits) for account, bits in item.get("answers", {}).items()},
                str(item.get("run", "")),
            )
            for item in values
        )
    )
