"""What a run has given away so far: one entry for every release, and the sum for every account.

An account is a client, or the whole federation where all are charged alike. The ledger is part of a run's
state and is written before a release is used, so that a run which was killed goes on with all of it. An entry
is named by round, attempt and the digest of what its noise hides: the same release made again after a resume
is charged once, another attempt at a round, or other sums under the same number, twice.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from fedllm.privacy.accounting import Charge, epsilon_of, merged, renyi_check


@dataclass(frozen=True)
class Entry:
    """One release: the charge of every account that took part."""

    round_num: int
    attempt: int
    release: str
    charges: Mapping[str, Charge]

    @property
    def name(self) -> tuple[int, int, str]:
        """What tells one release from another."""
        return self.round_num, self.attempt, self.release


@dataclass(frozen=True)
class Ledger:
    """All releases so far, in order."""

    entries: tuple[Entry, ...] = ()

    def with_entry(self, entry: Entry) -> "Ledger":
        """Return the ledger with one more release; one that it has already is not added again."""
        if any(known.name == entry.name for known in self.entries):
            return self
        return Ledger((*self.entries, entry))

    def with_all(self, other: "Ledger") -> "Ledger":
        """Return the ledger with the releases of another added that it has not, by round and attempt."""
        known = {entry.name for entry in self.entries}
        extra = [entry for entry in other.entries if entry.name not in known]
        return Ledger(tuple(sorted((*self.entries, *extra), key=lambda entry: entry.name[:2])))

    @cached_property
    def accounts(self) -> dict[str, tuple[Charge, ...]]:
        """Everything each account was charged."""
        found: dict[str, list[Charge]] = {}
        for entry in self.entries:
            for account, charge in entry.charges.items():
                found.setdefault(account, []).append(charge)
        return {account: merged(charges) for account, charges in found.items()}

    def of(self, account: str) -> tuple[Charge, ...]:
        """Return what an account was charged."""
        return self.accounts.get(account, ())

    @cached_property
    def distinct(self) -> set[tuple[Charge, ...]]:
        """The different sums of charges there are."""
        return set(self.accounts.values())

    def epsilon(self, delta: float) -> float:
        """Return the largest epsilon of any account, 0 where nothing was released.

        It is computed for the three sums of charges that the central limit of privacy loss ranks highest
        (Bu et al. 2020, arXiv 1911.11607): with many clients of many sizes each takes a second.
        """
        worst = sorted(self.distinct, key=_limit_mu, reverse=True)[:3]
        return max((epsilon_of(charges, delta) for charges in worst), default=0.0)

    def renyi_check(self, delta: float) -> float | None:
        """Return the same by Renyi accounting, None where dp-accounting is not installed."""
        worst = max(self.distinct, key=_limit_mu, default=())
        return renyi_check(worst, delta)

    def affords(self, account: str, charge: Charge, *, epsilon: float, delta: float, planned: int) -> bool:
        """Return whether an account may be charged once more within the budget.

        `planned` releases of that noise and rate are known to be within it, where it was calibrated for them;
        0 where nothing is known.
        """
        total = merged((*self.of(account), charge))
        if len(total) == 1 and total[0].count <= planned:
            return True
        return epsilon_of(total, delta) <= epsilon


def _limit_mu(charges: tuple[Charge, ...]) -> float:
    """Return mu^2 of the Gaussian that many sampled releases tend to."""
    return sum(c.count * c.rate**2 * math.expm1(min(500.0, c.noise_multiplier**-2)) for c in charges)


def ledger_to_dict(ledger: Ledger) -> list[dict[str, Any]]:
    """Return a JSON-ready form; `ledger_from_dict` is its inverse."""
    return [
        {
            "round": entry.round_num,
            "attempt": entry.attempt,
            "release": entry.release,
            "charges": {account: asdict(charge) for account, charge in entry.charges.items()},
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
            )
            for item in values
        )
    )
