"""A technique at the server: it collects a round's updates, then changes the state and the record.

The round loop (`strategies.rounds`) calls the same two steps of every technique and names none, so that a new
one is a file of its own and a line in `strategies.collectors`. Its half at the client is a
`clients.technique.Technique`.
"""

from typing import Protocol, TypeAlias

from fedllm.messages import ClientUpdate
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord

RoundOutcome: TypeAlias = tuple[ServerState, RoundRecord]  # the state after a round, and what it did


class Collector(Protocol):
    """One technique in one round."""

    def add(self, update: ClientUpdate) -> None:
        """Take in an accepted update. They come in the order of the plan, late ones last."""

    def close(self, before: ServerState, after: ServerState, record: RoundRecord) -> RoundOutcome:
        """Return `after` and `record` with what this technique makes of the round; called once, at its end.

        `before` is the state the clients started from, `after` what the collectors so far have made of it.
        Where `record.applied` is false the adapter stays as it was: all but a privacy ledger return both
        unchanged.
        """
