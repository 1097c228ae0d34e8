"""The server's half of the privacy plan: its secret and its budget. `private_round` has a round."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from fedllm.errors import BudgetSpentError
from fedllm.messages import JoinedClient
from fedllm.plan.privacy import FEDERATION, PrivacyPlan
from fedllm.privacy.accounting import Charge, check_installed
from fedllm.privacy.keys import derived_key, kept_secret, new_secret
from fedllm.privacy.ledger import Ledger, read_ledger
from fedllm.runs.checkpoint import ServerState

Clients: TypeAlias = Mapping[str, JoinedClient]  # by id

SECRET, JOURNAL = "noise-secret", "privacy-ledger.json"  # in the folder of a run that is never published


@dataclass(frozen=True, eq=False)
class ServerPrivacy:
    """The plan, the secret that noise and coins come from, and the file the ledger is written to, if any."""

    plan: PrivacyPlan
    secret: bytes
    journal: Path | None = None


def open_privacy(plan: PrivacyPlan | None, private: Path | None = None) -> ServerPrivacy | None:
    """Return the server's half of the plan of a run, None where it has none.

    `private` is the folder for the secret and the ledger; without one they live as long as this process.

    Raises:
        CheckpointError: the secret cannot be kept.
        ConfigError: the clip is adaptive and the cohort too small for it.
        MissingExtraError: the plan counts on sampling, and dp-accounting is not installed.
    """
    if plan is None:
        return None
    if plan.is_by_example or plan.rate < 1:  # what amplification by sampling is accounted with
        check_installed()
    if plan.adaptive:
        plan.split_noise(plan.multiplier())  # refuses a cohort that is too small
    if private is None:
        return ServerPrivacy(plan, new_secret())
    return ServerPrivacy(plan, kept_secret(private / SECRET), private / JOURNAL)


def with_journal(privacy: ServerPrivacy | None, state: ServerState) -> ServerState:
    """Return a state with the releases in the ledger on disk that it did not live to see.

    Raises:
        CheckpointError: the file is damaged, so what was spent is not known.
    """
    if privacy is None or privacy.journal is None:
        return state
    return replace(state, ledger=state.ledger.with_all(read_ledger(privacy.journal)))


def cohort_seed(privacy: ServerPrivacy | None, seed: int) -> int:
    """Return the seed that cohorts are drawn from: the run's own, or one made of its secret.

    Sampling amplifies privacy only while the cohort is secret, so under coins it is drawn from the secret.
    """
    if privacy is None or privacy.plan.rate == 1:
        return seed
    return int.from_bytes(derived_key(privacy.secret, "cohort")[:8], "big") >> 1  # 63 bits, as a seed has


def clip_of(privacy: ServerPrivacy | None, state: ServerState) -> float:
    """Return the clip of the next round's updates, 0 where the server adds no noise."""
    if privacy is None or not privacy.plan.is_central:
        return 0.0
    return state.clip or privacy.plan.clip


def clients_that_can_afford(
    privacy: ServerPrivacy | None, state: ServerState, clients: Clients, attempt: int
) -> set[str]:
    """Return the clients that may take part in an attempt at the next round; under coins all or none.

    An entry of this very attempt, left by a run that was killed in it, is taken to be of the same release.
    """
    if privacy is None:
        return set(clients)
    plan, this = privacy.plan, (state.round_num + 1, attempt)
    before = Ledger(tuple(entry for entry in state.ledger.entries if entry.name[:2] != this))

    def affords(account: str, client: JoinedClient | None) -> bool:
        charge, num_releases = charge_of(plan, client), sum(c.count for c in before.charges_of(account))
        if plan.limit and num_releases >= plan.limit * plan.steps:  # the noise was calibrated for so many
            return False
        return before.affords(account, charge, epsilon=plan.epsilon, delta=plan.delta, planned=plan.planned)

    if plan.rate < 1:  # one account for all: coins give every client the same
        return set(clients) if affords(FEDERATION, None) else set()
    return {name for name, client in clients.items() if affords(name, client)}


def charge_of(plan: PrivacyPlan, client: JoinedClient | None) -> Charge:
    """Return what one participation of a client costs."""
    return plan.charge(client.num_train if client is not None else 0)


def check_budget(
    privacy: ServerPrivacy | None, state: ServerState, clients: Clients, attempt: int, *, least: int
) -> None:
    """Stop before a round that would exceed the budget.

    Raises:
        BudgetSpentError: fewer than `least` clients can afford another round.
    """
    if privacy is None:
        return
    able = clients_that_can_afford(privacy, state, clients, attempt)
    if len(able) < min(least, len(clients)):  # too few clients at all is a failed round, not a spent budget
        plan = privacy.plan
        raise BudgetSpentError(
            f"the privacy budget is spent: epsilon {state.ledger.epsilon(plan.delta):.3g} of"
            f" {plan.epsilon:g} at delta {plan.delta:g}; the adapter of round {state.round_num} is the result"
        )
