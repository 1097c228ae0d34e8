"""How often what dies is started again, and how long to wait before."""

from dataclasses import dataclass, replace

MOST_RESTARTS = 10  # without a new round
_SHORTEST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds


@dataclass(frozen=True)
class Restarts:
    """Restarts since the last new round of a run: a run that gets on is never given up."""

    most: int
    round_num: int = 0
    number: int = 0

    def another(self, round_num: int) -> "Restarts":
        """Return the count with one more restart, of a run that has done so many rounds."""
        number = self.number + 1 if round_num <= self.round_num else 1
        return replace(self, round_num=max(round_num, self.round_num), number=number)

    @property
    def pause(self) -> float:
        """Seconds to wait: none before the first, then twice as long each time."""
        return 0.0 if self.number <= 1 else min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2.0 ** (self.number - 2))

    @property
    def are_too_many(self) -> bool:
        """Whether to give up."""
        return self.number > self.most
