"""A private round at the server: charged in the ledger and, under a central plan, noised as a sum.

Where the plan is central, a round's updates are clipped once more, summed, noised and divided by a number
that was fixed in advance. The result goes on as if one client had sent it: all that follows is
post-processing. Where clients add the noise themselves, the server only keeps the ledger.

See `fedllm.privacy.keys` for why a round that is done again gets the same noise, or noise that is unrelated,
but never the same noise over another sum.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState, at_rank, with_rank
from fedllm.adapters.parts import part_of, part_size, whole_of
from fedllm.messages import ClientUpdate, JoinedClient
from fedllm.plan.privacy import FEDERATION
from fedllm.privacy.keys import bits_digest, derived_key
from fedllm.privacy.noise import SecretStream, clipped, gaussian, is_within, next_clip
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan, RoundRecord
from strategies.collector import Collector
from strategies.privacy import ServerPrivacy, charge_round, clip_of, describe_round
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
    """Stands in front of the aggregate of a private run: nothing reaches it before it is charged.

    Without a `noised` sum the clients have noised their updates, which go straight to the aggregate.
    """

    privacy: ServerPrivacy
    plan: RoundPlan
    clients: Mapping[str, JoinedClient]
    seed: int
    aggregate: Collector
    noised: NoisedSum | None

    def add(self, update: ClientUpdate) -> None:
        """Add an update to the sum that is to be noised, else to the aggregate."""
        (self.noised or self.aggregate).add(update)

    def close(
        self, before: ServerState, after: ServerState, record: RoundRecord
    ) -> tuple[ServerState, RoundRecord]:
        """Charge the attempt, whether or not it is applied; then release the sum and close the aggregate.

        Raises:
            BudgetSpentError, CheckpointError: a release would exceed the budget, or cannot be recorded.
        """
        privacy, plan, noised = self.privacy, self.plan, self.noised
        release = release_sum(privacy, plan, noised) if noised is not None and record.applied else None
        # A round that is not applied releases nothing, but clients that noise for themselves have sent it.
        name = release.name if release else request_name(plan, before.adapter, self.seed)
        after = charge_round(privacy, after, plan, self.clients, name)
        asked = [self.clients[client] for client in plan.asked]
        clip = noised.clip if noised is not None else privacy.plan.clip
        record = describe_round(privacy, after, record, asked, clip)
        if release is None:
            return self.aggregate.close(before, after, record)
        self.aggregate.add(release.update)
        after, record = self.aggregate.close(before, replace(after, clip=release.clip), record)
        # Of one noised sum nobody can tell what its clients disagreed on.
        unknown = replace(record.aggregation, rho=None, largest_rho=None, kept_energy=None)
        return after, replace(record, aggregation=unknown)


def with_privacy(session: Session, state: ServerState, plan: RoundPlan, aggregate: Collector) -> Collector:
    """Return the aggregate of a round as it is, or behind the privacy plan of the run."""
    privacy, noised = session.privacy, None
    if privacy is None:
        return aggregate
    if privacy.plan.is_central:
        noised = NoisedSum(session.layout, plan.returned, clip_of(privacy, state))
    return PrivateCollector(privacy, plan, session.clients, session.config.seed, aggregate, noised)
