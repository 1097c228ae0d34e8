"""How the updates of a round come to the server: one by one, or as secret sums by the run's method."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import RecordDict

from fedllm.adapters.parts import part_size
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan, RoundRecord
from fedllm.secure.vector import NUM_NUMBERS
from strategies.exchange.receiving import Answer, receive
from strategies.secure.asked_sums import asked_sums, parties_of
from strategies.secure.methods import METHODS
from strategies.secure.relay_round import RelayRound
from strategies.secure.secret_round import SecretRound
from strategies.session import Session


class Updates(Protocol):
    """The updates of one attempt at a round."""

    def add_to(self, requests: Mapping[int, RecordDict]) -> None:
        """Add to the request to each node what it needs besides."""

    def answers(self, requests: Mapping[int, RecordDict]) -> Iterator[Answer]:
        """Send the requests; yield updates, of one client or of several, and why others have none."""

    def noted_in(self, record: RoundRecord) -> RoundRecord:
        """Return the record with what there is to say of how they came."""


@dataclass(frozen=True, eq=False)
class SingleUpdates:
    """Updates as clients send them, each by itself."""

    session: Session
    plan: RoundPlan

    def add_to(self, requests: Mapping[int, RecordDict]) -> None:
        """Add nothing."""

    def answers(self, requests: Mapping[int, RecordDict]) -> Iterator[Answer]:
        """Send the requests and yield what comes back."""
        return receive(self.session, self.plan, requests)

    def noted_in(self, record: RoundRecord) -> RoundRecord:
        """Return the record as it is."""
        return record


def open_updates(session: Session, state: ServerState, plan: RoundPlan) -> Updates:
    """Return the updates of an attempt at a round, none of which has been asked for yet."""
    if session.plan.secure is None or not plan.asked:
        return SingleUpdates(session, plan)
    parties = parties_of(session, plan)
    asked_all = asked_sums(session, state, plan, parties)
    if session.plan.secure.is_blind:  # the plan asks all clients, so that there is one sum
        (asked,) = asked_all
        return RelayRound(session, plan, asked, parties)
    method = METHODS[session.plan.secure.method]
    size = part_size(session.layout, plan.returned) + NUM_NUMBERS
    sums = [
        method.new_sum(
            session, plan.attempt, asked, {name: parties[name] for name in asked.exchange.names}, size
        )
        for asked in asked_all
    ]
    return SecretRound(session, plan, method, sums)
