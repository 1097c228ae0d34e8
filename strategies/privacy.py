"""The server's half of the privacy plan: the noise on a sum, the coins that stay secret, and the ledger.

Where the plan is central, a round's updates are clipped once more, summed, noised and divided by a number
that was fixed in advance; from there on the round goes on as if one client had sent the result, and all of it
is post-processing. Where clients noise for themselves the server only keeps account.

A release is in the ledger, and the ledger on disk, before it is used: a run that is killed afterwards cannot
forget it. See `fedllm.privacy.keys` for why a round that is done again gets the same noise, or noise that is
unrelated, but never the same noise over another sum.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState, at_rank, with_rank
from fedllm.adapters.parts import part_of, part_size, whole_of
from fedllm.errors import BudgetSpentError
from fedllm.messages import ClientUpdate, JoinedClient
from fedllm.plan.privacy import FEDERATION, PrivacyPlan
from fedllm.privacy.accounting import Charge, check_installed
from fedllm.privacy.keys import bits_digest, derived_key, kept_secret, new_secret
from fedllm.privacy.ledger import Entry, Ledger, read_ledger, write_ledger
from fedllm.privacy.noise import SecretStream, clipped, gaussian, is_within, next_clip
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import PrivacyRecord, RoundPlan, RoundRecord, TrainingRecord

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
    if plan.is_by_example or plan.rate < 1:
        check_installed()
    if plan.adaptive:
        plan.split_noise(plan.multiplier())
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
    """Return where a cohort is drawn from: the run's seed, or its secret where coins count as privacy.

    Whoever knows which coins fell has no use for the doubt that sampling casts.
    """
    if privacy is None or privacy.plan.rate == 1:
        return seed
    return int.from_bytes(derived_key(privacy.secret, "cohort")[:8], "big") >> 1


def charge_of(privacy: ServerPrivacy, client: JoinedClient | None) -> Charge:
    """Return what one participation of a client costs."""
    return privacy.plan.charge(client.num_train if client is not None else 0)


def who_can_afford(
    privacy: ServerPrivacy | None,
    ledger: Ledger,
    clients: Mapping[str, JoinedClient],
    *,
    round_num: int,
    attempt: int,
) -> set[str]:
    """Return the clients that may take part once more; under coins it is all of them or none.

    An entry of this very attempt, left by a run that was killed in it, is taken to be of the same release.
    """
    if privacy is None:
        return set(clients)
    plan = privacy.plan
    before = Ledger(tuple(entry for entry in ledger.entries if entry.name[:2] != (round_num, attempt)))

    def affords(account: str, client: JoinedClient | None) -> bool:
        charge, num_releases = charge_of(privacy, client), sum(c.count for c in before.of(account))
        if plan.limit and num_releases >= plan.limit * plan.steps:
            return False
        return before.affords(account, charge, epsilon=plan.epsilon, delta=plan.delta, planned=plan.planned)

    if plan.rate < 1:
        return set(clients) if affords(FEDERATION, None) else set()
    return {name for name, client in clients.items() if affords(name, client)}


def check_budget(
    privacy: ServerPrivacy | None,
    state: ServerState,
    clients: Mapping[str, JoinedClient],
    *,
    attempt: int,
    least: int,
) -> None:
    """Stop before a round that would exceed the budget.

    Raises:
        BudgetSpentError: fewer than `least` clients can afford another round.
    """
    if privacy is None:
        return
    able = who_can_afford(privacy, state.ledger, clients, round_num=state.round_num + 1, attempt=attempt)
    if len(able) < min(least, len(clients)):
        plan = privacy.plan
        raise BudgetSpentError(
            f"the privacy budget is spent: epsilon {state.ledger.epsilon(plan.delta):.3g} of"
            f" {plan.epsilon:g} at delta {plan.delta:g}; the adapter of round {state.round_num} is the result"
        )


@dataclass(eq=False)
class NoisedSum:
    """The running sum of a round's clipped updates, in float64, and whether more were within the clip.

    `add` in a fixed order gives fixed bits. Whatever an update holds, it moves the sum by at most `clip`, and
    `balance` by 1/2: up where it was within the clip, down where it was clipped. A client that is missing
    moves neither.
    """

    layout: AdapterLayout
    part: str
    clip: float
    balance: float = 0.0
    sum_Q: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def __post_init__(self) -> None:
        if not self.sum_Q.numel():
            self.sum_Q = torch.zeros(part_size(self.layout, self.part), dtype=torch.float64)

    def add(self, update: ClientUpdate) -> None:
        """Add one client: its delta clipped, times its weight, which is at most 1."""
        whole_P = with_rank(update.delta, at_rank(self.layout, update.rank), self.layout.rank)
        delta_Q = part_of(self.layout, whole_P, self.part)
        self.balance += 0.5 if is_within(delta_Q, self.clip) else -0.5
        self.sum_Q.add_(clipped(delta_Q, self.clip), alpha=bounded_weight(update.weight))


def bounded_weight(weight: float) -> float:
    """Return a weight as it counts in a noised sum: from 0 to 1, whatever was sent."""
    return min(1.0, weight) if weight > 0 else 0.0  # a comparison with NaN is false


@dataclass(frozen=True, eq=False)
class Release:
    """A noised sum on its way to the aggregate: as one update, with the clip of the next round."""

    update: ClientUpdate
    clip: float
    noise_multiplier: float
    name: str  # digest of what the noise hides


def empty_noised(
    privacy: ServerPrivacy | None, state: ServerState, layout: AdapterLayout, part: str
) -> NoisedSum | None:
    """Return the sum of no updates, None where the server adds no noise."""
    if privacy is None or not privacy.plan.is_central:
        return None
    return NoisedSum(layout, part, clip_of(privacy, state))


def clip_of(privacy: ServerPrivacy | None, state: ServerState) -> float:
    """Return the clip of the next round's updates, 0 where the server adds no noise."""
    if privacy is None or not privacy.plan.is_central:
        return 0.0
    return state.clip or privacy.plan.clip


def release_of(privacy: ServerPrivacy, plan: RoundPlan, noised: NoisedSum) -> Release:
    """Return the sum with noise of deviation z * clip, over the fixed denominator; equal sums, equal bits."""
    guarantee, z = privacy.plan, privacy.plan.multiplier()
    sum_multiplier, count_deviation = guarantee.split_noise(z) if guarantee.adaptive else (z, 0.0)
    name = bits_digest(noised.sum_Q, torch.tensor([noised.balance, noised.clip], dtype=torch.float64))

    def noise(use: str, size: int, deviation: float) -> torch.Tensor:
        key = derived_key(privacy.secret, use, plan.round_num, plan.attempt, name, repr(deviation))
        return gaussian(SecretStream(key), size, deviation)

    total_Q = noised.sum_Q + noise("sum", noised.sum_Q.numel(), sum_multiplier * noised.clip)
    clip = noised.clip
    if guarantee.adaptive:
        balance = noised.balance + float(noise("count", 1, count_deviation))
        clip = next_clip(clip, 0.5 + balance / guarantee.denominator)
    delta_Q = (total_Q / guarantee.denominator).float()
    update = ClientUpdate(
        client_id=FEDERATION,
        round_num=plan.round_num,
        rank=noised.layout.rank,
        delta=whole_of(noised.layout, delta_Q, noised.part),
        weight=1.0,
        num_tokens=0,
        train_loss=0.0,
    )
    return Release(update, clip, z, name)


def charged(
    privacy: ServerPrivacy,
    state: ServerState,
    plan: RoundPlan,
    clients: Mapping[str, JoinedClient],
    name: str,
) -> ServerState:
    """Return the state with an attempt at a round in its ledger, which is on disk by then.

    Everybody asked is charged: whether a client answered is not what the guarantee hides. `name` tells one
    release from another; who is asked again for the same one is not charged again.

    Raises:
        BudgetSpentError: this release is another than the one made before the run was killed, and both
            together exceed the budget.
        CheckpointError: the ledger cannot be written.
    """
    if privacy.plan.rate < 1:
        charges = {FEDERATION: charge_of(privacy, None)}
    else:
        charges = {client: charge_of(privacy, clients[client]) for client in plan.asked}
    entry = Entry(plan.round_num, plan.attempt, name, charges)
    ledger = state.ledger.with_entry(entry)
    if ledger is state.ledger:
        return state
    known = [earlier for earlier in state.ledger.entries if earlier.name[:2] == entry.name[:2]]
    if known:
        paid = {account for earlier in known if earlier.name == entry.name for account in earlier.charges}
        unpaid = {account: charge for account, charge in charges.items() if account not in paid}
        check_budget_of(privacy, state.ledger, unpaid)
    if privacy.journal is not None:
        write_ledger(privacy.journal, ledger)
    return replace(state, ledger=ledger)


def request_name(plan: RoundPlan, adapter: AdapterState, seed: int) -> str:
    """Return the name of a release that the clients make for themselves: what they were all asked for."""
    return hashlib.sha256(f"{plan.round_num} {plan.attempt} {adapter.digest} {seed}".encode()).hexdigest()


def check_budget_of(privacy: ServerPrivacy, ledger: Ledger, charges: Mapping[str, Charge]) -> None:
    """Refuse charges that the ledger as it is cannot take.

    Raises:
        BudgetSpentError: it would exceed the budget.
    """
    plan = privacy.plan
    for account, charge in charges.items():
        if not ledger.affords(account, charge, epsilon=plan.epsilon, delta=plan.delta, planned=0):
            raise BudgetSpentError(
                "this round was released once before the run was killed, from other updates; both together"
                f" exceed epsilon {plan.epsilon:g}, so it is not released again"
            )


def described(
    privacy: ServerPrivacy,
    state: ServerState,
    record: RoundRecord,
    clients: Iterable[JoinedClient],
    noised: NoisedSum | None,
) -> RoundRecord:
    """Return a record with what its round spent and used, and without the numbers the plan withholds."""
    plan = privacy.plan
    noise = [plan.multiplier(client.num_train) for client in clients] if plan.is_by_example else []
    spent = PrivacyRecord(
        epsilon=state.ledger.epsilon(plan.delta),
        noise_multiplier=max(noise, default=None) if plan.is_by_example else plan.multiplier(),
        clip=noised.clip if noised is not None else plan.clip,
    )
    training = record.training
    if plan.metrics != "all":
        training = TrainingRecord(learning_rate=training.learning_rate, trained=training.trained)
    return replace(record, privacy=spent, training=training)


def largest_noise(privacy: ServerPrivacy | None) -> float:
    """Return what noise of a client's own may add to a value of its delta: 10 deviations."""
    if privacy is None or not privacy.plan.is_local_client:
        return 0.0
    return 10 * privacy.plan.multiplier() * privacy.plan.clip
