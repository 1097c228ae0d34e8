"""The server's half of sparsification: it tells how much of the clients' changes travelled in a round."""

from dataclasses import dataclass, field

from fedllm.messages import ClientUpdate
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from strategies.session import Session


@dataclass(frozen=True, eq=False)
class SentShares:
    """The share of values above zero in size, for each update of a round so far."""

    session: Session
    shares: list[float] = field(default_factory=list)

    def add(self, update: ClientUpdate) -> None:
        """Take in an accepted update."""
        self.shares.append(float((update.delta != 0).float().mean()))

    def close(
        self, before: ServerState, after: ServerState, record: RoundRecord
    ) -> tuple[ServerState, RoundRecord]:
        """Return both unchanged: the mean of sparse changes is a change like any other."""
        if self.shares:
            mean = sum(self.shares) / len(self.shares)
            self.session.watch.notice(f"round {record.round_num}: {mean:.1%} of each change travelled")
        return after, record


def open_sent_shares(session: Session) -> SentShares | None:
    """Return the empty collector of a round, None where whole changes travel."""
    return SentShares(session) if session.config.train.sent_share < 1 else None
