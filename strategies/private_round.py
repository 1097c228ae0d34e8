"""A private round at the server: charged in the ledger and, under a central plan, noised as a sum.

What a round releases is in the ledger, and the ledger on disk, before it is used: a run that is killed
afterwards cannot forget it.

Where the plan is central, a round's updates are clipped once more, summed, noised and divided by a number
that was fixed in advance. The result goes on as if one client had sent it: all that follows is
post-processing. Where clients add the noise themselves, the server only keeps the ledger.

See `fedllm.privacy.keys` for why a round that is done again gets the same noise, or noise that is unrelated,
but never the same noise over another sum.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState, at_rank, with_rank
from fedllm.adapters.parts import part_of, part_size, whole_of
from fedllm.errors import BudgetSpentError
from fedllm.messages import ClientUpdate
from fedllm.plan.privacy import FEDERATION
from fedllm.privacy.accounting import Charge
from fedllm.privacy.keys import bits_digest, derived_key
from fedllm.privacy.ledger import Entry, Ledger, change_ledger
from fedllm.privacy.noise import SecretStream, clipped, gaussian, is_within, next_clip
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import PrivacyRecord, RoundPlan, RoundRecord, TrainingRecord
from strategies.collector import Collector, RoundOutcome
from strategies.privacy import Clients, ServerPrivacy, charge_of, clip_of
from strategies.session import Session


@dataclass(eq=False)
class NoisedSum:
    """The running sum of a round's clipped updates, and whether more were within the clip.

    Whatever an update holds, it moves the sum by at most `clip`, and `balance` by 1/2: up where it was within
    the clip, down where it was clipped. A client that is missing moves neither.
    """

    layout: AdapterLayout
    part: str
    clip: float
    balance: float = 0.0
    sum_Q: torch.Tensor = field(init=False)  # float64, so that adding in a fixed order gives fixed bits

    def __post_init__(self) -> None:
        self.sum_Q = torch.zeros(part_size(self.layout, self.part), dtype=torch.float64)

    def add(self, update: ClientUpdate) -> None:
        """Add one client: its delta clipped, times its weight, which is at most 1."""
        # Both factors at the run's rank: a sum has one shape, and padding with zeros changes no norm.
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
    name: str  # digest of what the noise hides


def release_sum(privacy: ServerPrivacy, plan: RoundPlan, noised: NoisedSum) -> Release:
    """Return the sum with noise of deviation z * clip, over the fixed denominator; equal sums, equal bits."""
    guarantee, z = privacy.plan, privacy.plan.multiplier()
    # An adaptive clip releases a noised count too; both together cost what z alone would.
    sum_multiplier, count_deviation = guarantee.split_noise(z) if guarantee.adaptive else (z, 0.0)
    name = bits_digest(noised.sum_Q, torch.tensor([noised.balance, noised.clip], dtype=torch.float64))

    def noise(use: str, size: int, deviation: float) -> torch.Tensor:
        # The name binds the noise to this sum: another sum gets unrelated noise, so no difference shows it.
        key = derived_key(privacy.secret, use, plan.round_num, plan.attempt, name, repr(deviation))
        return gaussian(SecretStream(key), size, deviation)

    # One client moves the sum by `clip` at most, so that is what z is a multiple of.
    total_Q = noised.sum_Q + noise("sum", noised.sum_Q.numel(), sum_multiplier * noised.clip)
    clip = noised.clip
    if guarantee.adaptive:
        balance = noised.balance + float(noise("count", 1, count_deviation))
        clip = next_clip(clip, 0.5 + balance / guarantee.denominator)
    # Not over the clients that answered: who is missing must not show.
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
    return Release(update, clip, name)


def request_name(plan: RoundPlan, adapter: AdapterState, seed: int) -> str:
    """Return the name of a release that the clients make for themselves: what they were all asked for."""
    return hashlib.sha256(f"{plan.round_num} {plan.attempt} {adapter.digest} {seed}".encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class PrivateCollector:
    """Stands in front of the aggregate of a private run, which is read out only once the round is charged.

    Without a `noised` sum the clients have noised their updates, which go straight to the aggregate.
    """

    privacy: ServerPrivacy
    plan: RoundPlan
    clients: Clients
    seed: int
    aggregate: Collector
    noised: NoisedSum | None
    received: dict[str, str] = field(default_factory=dict)  # client -> digest of what came, noised by itself

    def add(self, update: ClientUpdate) -> None:
        """Add an update to the sum that is to be noised, else to the aggregate."""
        if self.noised is None:
            bits = bits_digest(update.delta, torch.tensor([update.weight], dtype=torch.float64))
            self.received.update(dict.fromkeys((one.client_id for one in update.members or (update,)), bits))
        (self.noised or self.aggregate).add(update)

    def close(self, before: ServerState, after: ServerState, record: RoundRecord) -> RoundOutcome:
        """Charge what the attempt has released; then release the sum and close the aggregate.

        Where the server adds the noise, an attempt that is not applied has released nothing. Where clients
        do, they have sent their updates whatever becomes of the round.

        Raises:
            BudgetSpentError, CheckpointError: a release would exceed the budget, or cannot be recorded.
        """
        plan, noised = self.plan, self.noised
        release = release_sum(self.privacy, plan, noised) if noised is not None and record.applied else None
        if noised is None or release is not None:
            name = release.name if release else request_name(plan, before.adapter, self.seed)
            after = self.charge_round(after, name, record.unsent)
        record = self.describe_round(after, record)
        if release is None:
            return self.aggregate.close(before, after, record)
        self.aggregate.add(release.update)
        after, record = self.aggregate.close(before, replace(after, clip=release.clip), record)
        # Of one noised sum nobody can tell what its clients disagreed on.
        unknown = replace(record.aggregation, rho=None, largest_rho=None, kept_energy=None)
        return after, replace(record, aggregation=unknown)

    def charge_round(self, state: ServerState, name: str, unsent: Collection[str] = ()) -> ServerState:
        """Return the state with this attempt at a round in its ledger, which is on disk by then.

        Everybody who may have sent an update is charged, whether or not it arrived and was sound. Who
        reported that there is none (`unsent`: no such device, no memory, no budget) has not: nothing of its
        rows was used or sent. That it failed is public, and the guarantee never hides it. Coins charge all,
        drawn or not. `name` tells one release from another; who is asked again for the same one is charged
        again only where other bits came, as from another device.

        Raises:
            BudgetSpentError: this release is another than the one made before the run was killed, and both
                together exceed the budget.
            CheckpointError: the ledger cannot be written.
        """
        plan = self.privacy.plan
        if plan.rate < 1:
            charges = {FEDERATION: charge_of(plan, None)}
        else:
            may_have_sent = (client for client in self.plan.asked if client not in unsent)
            charges = {client: charge_of(plan, self.clients[client]) for client in may_have_sent}
        if not charges:
            return state
        received = {client: bits for client, bits in self.received.items() if client in charges}
        unsampled = self._not_sampled(state.ledger, charges, received)
        charges |= unsampled
        entry = Entry(self.plan.round_num, self.plan.attempt, name, charges, answers=received)
        ledger = state.ledger.with_entry(entry)
        if ledger is state.ledger:  # the same release as before the run was killed: paid already
            return state
        # `clients_that_can_afford` left this attempt out, but what its earlier start released counts too.
        is_known = any(earlier.name[:2] == entry.name[:2] for earlier in state.ledger.entries)
        for account, charge in (charges if is_known else unsampled).items():
            if ledger.charges_of(account) != state.ledger.charges_of(account) and not state.ledger.affords(
                account, charge, epsilon=plan.epsilon, delta=plan.delta, planned=0
            ):
                raise BudgetSpentError(
                    "this round was released once before, from other updates; both together exceed epsilon"
                    f" {plan.epsilon:g}, so it is not released again"
                )
        if self.privacy.journal is not None:
            change_ledger(self.privacy.journal, lambda kept: kept.with_all(ledger))
        return replace(state, ledger=ledger)

    def _not_sampled(
        self, ledger: Ledger, charges: Mapping[str, Charge], received: Mapping[str, str]
    ) -> dict[str, Charge]:
        """Return the charges of clients that answered this round before, with other bits, as not sampled.

        The coins that draw a client's rows follow the request: both answers are of the same rows, so only the
        first was amplified by sampling.
        """
        before = [entry.answers for entry in ledger.entries if entry.round_num == self.plan.round_num]
        other = {
            client
            for answers in before
            for client, bits in received.items()
            if charges[client].rate < 1 and answers.get(client, bits) != bits
        }
        return {client: replace(charges[client], rate=1.0) for client in other}

    def describe_round(self, state: ServerState, record: RoundRecord) -> RoundRecord:
        """Return a record with what its round spent and used, and without the numbers the plan withholds."""
        plan = self.privacy.plan
        if plan.is_by_example:  # a client's noise follows from its number of rows
            noise = [plan.multiplier(self.clients[client].num_train) for client in self.plan.asked]
        else:
            noise = [plan.multiplier()]
        spent = PrivacyRecord(
            epsilon=state.ledger.epsilon(plan.delta),
            noise_multiplier=max(noise, default=None),
            clip=self.noised.clip if self.noised is not None else plan.clip,
        )
        training = record.training
        if plan.metrics != "all":
            training = TrainingRecord(learning_rate=training.learning_rate, trained=training.trained)
        return replace(record, privacy=spent, training=training)


def with_privacy(session: Session, state: ServerState, plan: RoundPlan, aggregate: Collector) -> Collector:
    """Return the aggregate of a round as it is, or behind the privacy plan of the run."""
    privacy, noised = session.privacy, None
    if privacy is None:
        return aggregate
    if privacy.plan.is_central:
        noised = NoisedSum(session.layout, plan.returned, clip_of(privacy, state))
    return PrivateCollector(privacy, plan, session.clients, session.config.seed, aggregate, noised)
